import pytest
import torch
from torch.nn import functional

from fedcodec.sim.data import load_dataset
from fedcodec.sim.distillation import distillation_loss, train_student
from fedcodec.sim.models import FlatModel, build_model

pytestmark = pytest.mark.usefixtures("one_thread")

ALPHA, TEMPERATURE = 0.3, 2.5


@pytest.fixture
def digits():
    return load_dataset("digits")


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(12, 5, generator=generator) * 3 for _ in range(2))
    return student.requires_grad_(), teacher, torch.arange(12) % 5


def divergence(student, teacher):
    answers = functional.log_softmax(student / TEMPERATURE, 1)
    targets = functional.log_softmax(teacher / TEMPERATURE, 1)
    return functional.kl_div(answers, targets, reduction="batchmean", log_target=True)


def test_the_loss_is_that_of_algorithm_3(logits):
    student, teacher, labels = logits
    targets = (teacher / TEMPERATURE).exp()
    targets = targets / targets.sum(1, keepdim=True)
    answers = (student / TEMPERATURE).exp()
    answers = answers / answers.sum(1, keepdim=True)
    soft = -(targets * answers.log()).sum(1).mean()
    hard = -(student.exp() / student.exp().sum(1, keepdim=True))[range(12), labels].log().mean()
    expected = ALPHA * TEMPERATURE**2 * soft + (1 - ALPHA) * hard
    torch.testing.assert_close(
        distillation_loss(student, teacher, labels, ALPHA, TEMPERATURE), expected
    )


def test_gradients_are_those_of_the_divergence(logits):
    student, teacher, labels = logits
    found = torch.autograd.grad(
        distillation_loss(student, teacher, labels, ALPHA, TEMPERATURE), student
    )
    expected = torch.autograd.grad(
        ALPHA * TEMPERATURE**2 * divergence(student, teacher)
        + (1 - ALPHA) * functional.cross_entropy(student, labels),
        student,
    )
    torch.testing.assert_close(found, expected)


def test_without_weight_of_the_teacher_only_labels_count(logits):
    student, teacher, labels = logits
    found = distillation_loss(student, teacher, labels, alpha=0)
    torch.testing.assert_close(found, functional.cross_entropy(student, labels))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"alpha": 1.1}, "alpha"), ({"alpha": -0.1}, "alpha"), ({"temperature": 0}, "temperature")],
)
def test_impossible_weights_are_refused(logits, arguments, message):
    with pytest.raises(ValueError, match=message):
        distillation_loss(*logits, **arguments)


def test_training_follows_torch_sgd(digits):
    teacher = build_model("mlp", digits, (32,), seed=9).train()
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    plain = build_model("mlp", digits, (8,), seed=1)
    student = FlatModel(build_model("mlp", digits, (8,), seed=1))
    images, labels = digits.train_images[:60], digits.train_labels[:60]
    orders = [torch.arange(60), torch.arange(60).flip(0)]
    optimiser = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for order in orders:
        for batch in order.split(20):
            optimiser.zero_grad()
            loss = distillation_loss(
                plain(images[batch]), teacher(images[batch]), labels[batch], ALPHA, TEMPERATURE
            )
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    teacher.zero_grad(set_to_none=True)
    found = train_student(
        student, teacher, images, labels, orders, 20, 0.05, 0.9, ALPHA, TEMPERATURE
    )
    assert found == pytest.approx(sum(losses) / 6, rel=1e-4)
    trained = student.named(student.weights)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(
            torch.from_numpy(trained[name]), parameter.detach(), rtol=1e-3, atol=1e-5
        )
    assert not teacher.training
    for name, parameter in teacher.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, state[name])


def test_a_student_learns_from_answers_alone(digits):
    teacher = FlatModel(build_model("mlp", digits, (64,), seed=9))
    orders = [torch.randperm(1437, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    images, labels = digits.train_images, digits.train_labels
    teacher.train(images, labels, orders, 16, 0.05, 0.9)
    student = FlatModel(build_model("mlp", digits, (16,), seed=1))
    nothing = torch.zeros_like(labels)
    train_student(student, teacher.module, images, nothing, orders, 16, 0.05, 0.9, alpha=1)
    assert student.evaluate(digits.test_images, digits.test_labels)[0] > 0.9

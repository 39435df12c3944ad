"""DistributedDataParallel whose gradients travel as payloads: torchrun --standalone --nproc-per-node 2 train.py."""

import os
import sys

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from fedcodec.adapters.torch_ddp import CodecState, codec_hook

CODEC = sys.argv[1] if len(sys.argv) > 1 else "topk(0.05) | int8"
STEPS = 600


def main():
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    images, labels = map(torch.as_tensor, load_digits(return_X_y=True))
    images = images.float() / 16
    own = slice(300 + dist.get_rank(), None, dist.get_world_size())
    layers = torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(*layers))
    state = CodecState(CODEC)  # fedcodec
    model.register_comm_hook(state, codec_hook)  # fedcodec
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(STEPS):
        batch = torch.randint(len(labels[own]), (32,))
        optimizer.zero_grad()
        cross_entropy(model(images[own][batch]), labels[own][batch]).backward()
        optimizer.step()
    if dist.get_rank() == 0:
        accuracy = (model(images[:300]).argmax(1) == labels[:300]).float().mean()
        ratio = state.gradient_bytes / state.sent_bytes
        print(f"{CODEC}: accuracy {accuracy:.3f}, gradients {ratio:.1f} times smaller")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads sometimes abort a process that ends by itself


if __name__ == "__main__":
    main()

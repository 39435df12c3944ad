"""Every example in the documentation runs."""

import doctest
import importlib
import inspect
import pkgutil
import re
import shlex
import warnings
from pathlib import Path

import numpy as np
import pytest

import fedcodec as fc

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
NAMES = [
    module.name
    for module in pkgutil.walk_packages(fc.__path__, "fedcodec.")
    if not module.name.endswith("_native")
]
OPTIONAL = {
    *("torch", "click", "rich", "safetensors", "matplotlib", "sklearn", "scipy", "ml_dtypes"),
    *("flwr", "nvflare", "openfl"),
}
ERRORS = {"BackendError", "DecodeError", "FedcodecError", "NonFiniteError", "SpecMismatch"}
# Plain records and bases: what they are used for has the example.
WITHOUT_EXAMPLE = {
    *ERRORS,
    "Codec",
    "Lossless",
    "Quantizer",
    "Limits",
    "MaskBits",
    "PayloadInfo",
    "TensorSpec",
    "ops",
}


def load(name):
    try:
        with warnings.catch_warnings():
            if name.startswith("fedcodec.adapters."):
                warnings.simplefilter("ignore", DeprecationWarning)  # of what frameworks import
            return importlib.import_module(name)
    except (ImportError, SystemExit) as error:  # the command line ends where click is missing
        missing = getattr(error, "name", None) or "click"
        if missing in ("fedcodec._native", "fedcodec._cuda"):
            pytest.skip(f"{name}: {missing} is not compiled here")
        if missing.partition(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"{name} needs {missing}")


@pytest.mark.parametrize("name", ["fedcodec", *NAMES])
def test_examples_in_docstrings(name):
    module = load(name)
    if name.startswith("fedcodec.sim."):
        pytest.importorskip("sklearn", reason=f"the examples of {name} need scikit-learn")
    if name in ("fedcodec.codecs.autoencoder", "fedcodec.codecs.funnel"):
        pytest.importorskip("torch", reason=f"the examples of {name} need torch")
    given = {"np": np, "fc": fc, "ops": fc.ops}
    result = doctest.testmod(module, extraglobs=given, optionflags=doctest.FAIL_FAST)
    assert result.failed == 0


@pytest.mark.parametrize("name", [name for name in fc.__all__ if name not in WITHOUT_EXAMPLE])
def test_everything_public_has_an_example(name):
    assert ">>>" in inspect.getdoc(getattr(fc, name)), f"{name} has no example"


@pytest.mark.parametrize("name", fc.ops.__all__)
def test_every_kernel_has_an_example(name):
    assert ">>>" in inspect.getdoc(getattr(fc.ops, name)), f"{name} has no example"


def test_all_is_all():
    assert fc.__all__ == sorted(fc.__all__)
    for name in fc.__all__:
        assert inspect.getdoc(getattr(fc, name))
    public = {
        name for name, value in vars(fc).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }  # fmt: skip
    assert public <= set(fc.__all__)


def torch_has_cuda():
    return fc.ops.cuda_missing() is None and importlib.import_module("torch").cuda.is_available()


def test_the_readme(tmp_path, monkeypatch):
    if not README.exists():
        pytest.skip("an installed package has no README")
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    namespace = {"__name__": "readme"}
    for block in blocks:
        if 'device="cuda"' in block and not torch_has_cuda():
            continue
        if ">>>" in block:
            test = doctest.DocTestParser().get_doctest(block, namespace, "README", str(README), 0)
            assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed == 0
        else:
            exec(compile(block, str(README), "exec"), namespace)
    assert blocks


def test_the_page_on_integrations(tmp_path, monkeypatch):
    page = REPOSITORY / "docs" / "integrations.md"
    if not page.exists():
        pytest.skip("an installed package has no documentation")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.S | re.M)
    whole = [block for block in blocks if block.startswith("import numpy")]
    assert len(whole) == 1  # the others are lines of the frameworks' own programs, as in examples/
    exec(compile(whole[0], str(page), "exec"), {"__name__": "page"})


def test_the_readme_s_commands(tmp_path, monkeypatch):
    if not README.exists():
        pytest.skip("an installed package has no README")
    for package in ("click", "jinja2", "safetensors", "torch", "sklearn", "matplotlib"):
        pytest.importorskip(package)
    from click.testing import CliRunner

    from fedcodec import cli

    monkeypatch.chdir(tmp_path)
    np.savez("model.npz", weight=np.arange(1000, dtype=np.float32))
    lines = re.findall(r"^fedcodec .*$", README.read_text(encoding="utf-8"), re.MULTILINE)
    commands = [shlex.split(line, comments=True)[1:] for line in lines]
    names = {"compress", "inspect", "decompress", "simulate", "study"}
    assert names == {command[0] for command in commands}
    for command in commands:
        if command[0] in ("simulate", "study"):
            command += ["--jobs", "1"]
        if command[0] == "study" and command[1] != "autoencoder":
            command += ["--rounds", "1"]  # the tests of the studies run them whole
        result = CliRunner().invoke(cli.commands, command)
        assert result.exit_code == 0, (command, result.output, result.exception)

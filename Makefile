PYTHON ?= python3
# Whatever pip takes: make demo TORCH="torch==2.13.0 --index-url URL"
TORCH ?= $(shell cat constraints.txt)
PYTEST_ARGS ?=
# Minutes of nvcc: with a GPU at hand, make build FEDCODEC_CUDA=ON.
export FEDCODEC_CUDA ?= OFF
BENCH_ARGS ?=
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
CONSTRAIN := -c .venv/constraints.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --no-build-isolation
PYTEST := $(BIN)/python -m pytest -q -n auto tests $(PYTEST_ARGS)
WORKFLOW := $(BIN)/cmake --workflow --preset
CXX_SOURCES := $(shell find csrc tests/native tests/cuda_emulator -name '*.cc' -o -name '*.h' -o -name '*.cu')

.PHONY: demo test bench test-all test-native test-neon test-asan test-cuda test-slow test-isa test-engines build lint tidy format clean

demo: build
	$(BIN)/fedcodec simulate --output out/demo

test: build
	$(PYTEST)

bench: .venv/bench
	$(BIN)/fedcodec bench --output benchmarks/results $(BENCH_ARGS)

# CI reads the closing line of the last run, so one that has passing tests on every machine ends it.
test-all: lint tidy test-native test-neon test-asan test-cuda test-slow test-engines test-isa

test-native: build
	$(WORKFLOW) native
	$(WORKFLOW) native-asan
	$(WORKFLOW) native-tsan

test-neon: build
ifeq ($(shell command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64),)
	@echo "skipped: the NEON kernels need g++-aarch64-linux-gnu and qemu-user"
else
	$(WORKFLOW) aarch64
endif

# An environment of its own, which finds all other packages in the first one.
define ENVIRONMENT
	$(BIN)/python -m venv --without-pip $(1)
	$(BIN)/python -c 'import site; print(*site.getsitepackages())' \
	  > "$$($(1)/bin/python -c 'import site; print(*site.getsitepackages())')/deps.pth"
endef
INSTALL_IN = $(PIP) --python $(1)/bin/python install --quiet --no-build-isolation --no-deps

# libstdc++ is preloaded as well, or the first exception dies; pytest must leave stderr to the
# sanitizers' reports.
test-asan: build
	$(call ENVIRONMENT,build/asan)
	FEDCODEC_SANITIZE=address,undefined $(call INSTALL_IN,build/asan) \
	  -C cmake.build-type=RelWithDebInfo .
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  build/asan/bin/python -m pytest -q -n auto tests --capture=sys -m 'native and not slow' $(PYTEST_ARGS)

# The tests for a GPU on an emulated one; then, where there is nvcc, what the true module does
# without a GPU.
test-cuda: build
	$(call ENVIRONMENT,build/emulated)
	FEDCODEC_CUDA=EMULATED $(call INSTALL_IN,build/emulated) .
	build/emulated/bin/python -m pytest -q -n auto tests -m gpu $(PYTEST_ARGS)
ifeq ($(shell command -v nvcc),)
	@echo "skipped: the CUDA module needs nvcc"
else
	$(call ENVIRONMENT,build/cuda)
	FEDCODEC_CUDA=ON $(call INSTALL_IN,build/cuda) .
	$(call INSTALL_IN,build/cuda) nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	build/cuda/bin/python -m pytest -q -n auto tests -m gpu $(PYTEST_ARGS)
endif

test-slow: build
	$(PYTEST) -m slow

# The one that make test has run is left out.
test-isa: build
	isas=$$($(BIN)/python -c 'from fedcodec import ops; print(*(isa for isa in ops.available() if isa != ops.active()))') && \
	for isa in $$isas; do \
	  echo "FEDCODEC_ISA=$$isa"; \
	  FEDCODEC_ISA=$$isa $(PYTEST) -m 'native and not slow' || exit; \
	done

# Each framework in an environment of its own: what they need does not go together.
test-engines: build
	$(call ENVIRONMENT,build/flower)
	$(PIP) --python build/flower/bin/python install --quiet $(CONSTRAIN) 'flwr[simulation]>=1.41,<1.43'
	$(call INSTALL_IN,build/flower) .
	build/flower/bin/python -m pytest -q -n auto tests/test_flower.py tests/test_flower_engines.py \
	  'tests/test_docs.py::test_examples_in_docstrings[fedcodec.adapters.flower]' -m '' $(PYTEST_ARGS)
	$(call ENVIRONMENT,build/nvflare)
	$(PIP) --python build/nvflare/bin/python install --quiet $(CONSTRAIN) 'nvflare>=2.9,<2.10'
	$(call INSTALL_IN,build/nvflare) .
	build/nvflare/bin/python -m pytest -q tests/test_nvflare.py \
	  'tests/test_docs.py::test_examples_in_docstrings[fedcodec.adapters.nvflare]' -m '' $(PYTEST_ARGS)
	$(call ENVIRONMENT,build/openfl)
	$(PIP) --python build/openfl/bin/python install --quiet $(CONSTRAIN) 'openfl>=1.9,<1.10' 'numpy<2.4'
	$(call INSTALL_IN,build/openfl) .
	build/openfl/bin/python -m pytest -q tests/test_openfl.py \
	  'tests/test_docs.py::test_examples_in_docstrings[fedcodec.adapters.openfl]' $(PYTEST_ARGS)

lint: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

# One stamp stands for all: they share their bodies. What GCC's warnings say is the build's matter.
tidy: .venv/dev
	FEDCODEC_WERROR=OFF $(BIN)/cmake --preset native
	$(BIN)/clang-tidy --quiet -p build/native csrc/*.cc csrc/cpu/baseline.cc csrc/cpu/dispatch.cc

format: .venv/dev
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_SOURCES)

build: .venv/built

# torch first and alone, so that no dependency chooses another build of it. The pure-Python build
# stands in for the package here: it needs no compiler, so a compile error costs no installation.
.venv/deps: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("fedcodec needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet $(TORCH)
	$(PIP) list --format=freeze | grep '^torch==' > .venv/constraints.txt
	$(PIP) install --quiet $(CONSTRAIN) 'scikit-build-core>=0.10' 'pybind11>=2.13' cmake ninja
	FEDCODEC_NATIVE=OFF $(INSTALL) $(CONSTRAIN) '.[test]'
	touch $@

.venv/built: .venv/deps CMakeLists.txt $(CXX_SOURCES)
	$(INSTALL) --no-deps --editable .
	touch $@

.venv/dev: .venv/deps | .venv/built
	$(INSTALL) $(CONSTRAIN) --editable '.[dev]'
	touch $@

.venv/bench: .venv/deps | .venv/built
	$(INSTALL) $(CONSTRAIN) --editable '.[bench]'
	touch $@

clean:
	rm -rf .venv build out dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

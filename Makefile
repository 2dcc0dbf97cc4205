# Two commands matter: `make demo` and `make test`. Both make .venv first if need be.
# TORCH_ARGS is for pip when it installs torch, e.g.
#   make test TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
# for the small CPU build where the default index serves the CUDA build.
PYTHON ?= python3
TORCH_ARGS ?=
BIN := .venv/bin
WORKERS ?= 2
# e.g. make bench BENCH_ARGS="--works mlp,cnn --pairs 40"; peers that are not installed
# (.venv/bin/pip install -c constraints.txt -e '.[jax]') count as refused
BENCH_ARGS ?=
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all test-oldest lint types golden bench bench-gpu bench-memory bench-attention bench-laplacian bench-jacobians bench-jvps bench-capture bench-without-torch clean coverage reference zoo beyond-torch

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH_ARGS) torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: export OMP_NUM_THREADS = 2
demo: .venv/installed
	$(BIN)/python examples/demo.py

test: .venv/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-all: .venv/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m ""

# with the oldest torch that pyproject.toml takes; its wheels come with CUDA, some gigabytes
test-oldest:
	$(PYTHON) -m venv build/oldest
	sed '/^torch/d; /^triton/d' constraints.txt > build/oldest.txt
	build/oldest/bin/pip install --quiet -c build/oldest.txt torch==2.11.0 torchvision==0.26.0
	build/oldest/bin/pip install --quiet -c build/oldest.txt -e '.[dev]'
	build/oldest/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# the package as it is installed, rules within
types: .venv/installed
	rm -rf build/types && mkdir -p build/types && cp -r fwdcompile build/types/
	cp -r rules build/types/fwdcompile/rules
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml

golden: .venv/installed
	$(BIN)/python -m pytest tests/test_golden.py --regenerate-golden -p no:xdist

coverage: .venv/installed
	$(BIN)/python benchmarks/coverage_page.py

reference: .venv/installed
	$(BIN)/python benchmarks/reference_page.py

zoo: .venv/installed
	$(BIN)/python benchmarks/zoo.py

beyond-torch: .venv/installed
	$(BIN)/python benchmarks/beyond_torch.py

bench: export OMP_NUM_THREADS = 2
# glibc keeps what a step frees: handing it back costs 18,752 page faults a step of the CNN
bench: export MALLOC_TRIM_THRESHOLD_ = 4000000000
bench: export MALLOC_MMAP_THRESHOLD_ = 33554432
bench: .venv/installed
	$(BIN)/python benchmarks/step.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/plots.py

bench-gpu: .venv/installed
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/memory.py --device cuda --at-once 8
	$(BIN)/python benchmarks/plots.py

# sets the allocator of its own processes, so that what a step frees is handed back
bench-memory: export OMP_NUM_THREADS = 2
bench-memory: .venv/installed
	$(BIN)/python benchmarks/memory.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/plots.py

bench-attention: export OMP_NUM_THREADS = 2
bench-attention: .venv/installed
	$(BIN)/python benchmarks/attention.py

# another peer, on Python 3.12: .venv/bin/pip install -c constraints.txt -e '.[taylor]'
bench-laplacian bench-jacobians bench-jvps: export OMP_NUM_THREADS = 2
bench-laplacian bench-jacobians bench-jvps: export MALLOC_TRIM_THRESHOLD_ = 4000000000
bench-laplacian bench-jacobians bench-jvps: export MALLOC_MMAP_THRESHOLD_ = 33554432
bench-laplacian: .venv/installed
	$(BIN)/python benchmarks/laplacian.py

bench-jacobians: .venv/installed
	$(BIN)/python benchmarks/jacobians.py

bench-jvps: .venv/installed
	$(BIN)/python benchmarks/jvps.py

bench-capture: .venv/installed
	$(BIN)/python benchmarks/capture.py

bench-without-torch: export OMP_NUM_THREADS = 2
bench-without-torch: export MALLOC_TRIM_THRESHOLD_ = 4000000000
bench-without-torch: export MALLOC_MMAP_THRESHOLD_ = 33554432
bench-without-torch: .venv/installed
	$(BIN)/python benchmarks/without_torch.py

clean:
	rm -rf .venv build dist *.egg-info runs

# One entry point; CI runs the same targets. Every target does its own set-up.
.PHONY: setup run test test-vm check bench peers verifier lock clean
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
LINKED := src/safeconduct/runtime/ src/safeconduct/policies/ src/safeconduct/attestation/
# Two at a time, a file never divided: most of them wait for processes, disks and clocks.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile
SOURCES := $(wildcard native/Cargo.* native/launcher/Cargo.toml native/launcher/src/*.rs)

setup: $(VENV)/.ready ## make .venv, build the launcher, install everything (idempotent)

$(VENV)/.ready: requirements.lock pyproject.toml scripts/require.sh $(SOURCES)
	@python=$$(scripts/require.sh) && { [ -x $(BIN)/python ] || "$$python" -m venv $(VENV); }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

run: setup ## the demo: an agent's calls judged, confined, recorded, verified and replayed
	$(BIN)/python examples/demo/run.py

test: setup ## every test
	cd native && cargo test --locked --quiet
	$(PYTEST)

test-vm: setup ## stock kernels under QEMU: cgroup v2, refused namespaces, no Landlock (minutes)
	scripts/vm-packages.sh
	$(BIN)/python -m pytest tests/vm/boots.py

check: setup ## format, lint, types, imports, native lints, tests: what CI runs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check . $(LINKED)
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports
	cd native && cargo fmt --check && cargo clippy --locked --quiet --all-targets -- -D warnings
	cd native && cargo test --locked --quiet
	$(PYTEST)

bench: setup ## every benchmark, quickly; see benchmarks/ for the long runs
	@for file in benchmarks/bench_*.py; do \
	    name=$$(basename $$file .py); echo "== $$name"; $(BIN)/python -m benchmarks.$$name --quick || exit 1; \
	done

peers: ## build OPA for bench_decision into build/peers: needs Go, takes minutes the first time
	cd benchmarks/opa && go build -o ../../build/peers/opa github.com/open-policy-agent/opa

verifier: setup ## build the verifier alone, a pure-Python wheel, into dist/
	$(BIN)/python scripts/build_verifier.py dist

lock: ## write requirements.lock anew from pyproject.toml
	$(BIN)/pip-compile --quiet --extra dev --generate-hashes --strip-extras --allow-unsafe \
	    --no-emit-index-url --no-emit-find-links --no-emit-trusted-host -o requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) native/target runtime/bin build dist demo-trace src/*.egg-info

# The commands of CONTRIBUTING.md. Everything that they need goes into a virtual environment. The checks
# are in noxfile.py.
PYTHON ?= python3
DEMO_PLUGIN := $(PLUGIN)
PLUGIN ?= 1.6.0
CONSTRAINTS := constraints/plugin-$(PLUGIN).txt
VENV := .venv$(PLUGIN:1.6.0=)
BIN := $(VENV)/bin
NATIVE_POOL := 1.8.9
PEERS := .venv-peers
PURELIB := import sysconfig; print(sysconfig.get_path("purelib"))

.PHONY: demo demo-of test matrix sessions newest bench bench-peers lint clean

# With the newest plugin that is supported, or with PLUGIN.
NEWEST = $(shell $(PYTHON) -c \
	'from xai_pool_patch.plugin.releases import RELEASES; print(RELEASES[-1].versions[-1])' 2>/dev/null)

demo:
	@$(PYTHON) xai_pool_patch/python.py
	@$(MAKE) --no-print-directory demo-of PLUGIN=$(or $(DEMO_PLUGIN),$(NEWEST))

demo-of: $(VENV)/ready
	$(BIN)/xai-pool-patch demo

test: $(VENV)/ready
	$(BIN)/nox --session tests

# Every environment of noxfile.py, two at a time. pyenv shows only the interpreters that
# PYENV_VERSION names.
matrix: $(VENV)/ready
	PYENV_VERSION=$$(pyenv versions --bare 2>/dev/null | paste -sd:) $(BIN)/nox --parallel 2 \
		$(if $(SESSION),--session '$(SESSION)')

# The names of the matrix's sessions, as a JSON list.
sessions: $(VENV)/ready
	@$(BIN)/nox --list --json | $(BIN)/python -c \
		'import json, sys; print(json.dumps([run["session"] for run in json.load(sys.stdin)]))'

# The newest releases of LiveKit, verified or not.
newest: $(VENV)/ready
	$(BIN)/nox --session newest

bench: $(VENV)/ready
	$(BIN)/python -m benchmarks

# The same conversations with pipecat's xAI service, and with a plugin that has a native pool.
bench-peers: $(VENV)/ready $(PEERS)/ready
	$(MAKE) PLUGIN=$(NATIVE_POOL) .venv$(NATIVE_POOL)/ready
	$(BIN)/python -m benchmarks peers --pipecat $(PEERS)/bin/python \
		--native-pool .venv$(NATIVE_POOL)/bin/python

$(PEERS)/ready: benchmarks/peers/constraints.txt $(VENV)/ready
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(PEERS)
	$(BIN)/uv pip install --quiet --python $(PEERS)/bin/python \
		--constraint benchmarks/peers/constraints.txt 'pipecat-ai[xai]'
	touch $@

lint: $(VENV)/ready
	$(BIN)/nox --session lint

# ensurepip puts pip into the environment. Debian and Ubuntu have it in a package of its own. Without
# that package, the pip of $(PYTHON) does it, if there is one.
$(VENV)/ready: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) xai_pool_patch/python.py
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(PYTHON) -c 'import pip, venv' 2>/dev/null || { \
		echo '$(PYTHON) cannot make a virtual environment. Debian and Ubuntu: apt-get install python3-venv' >&2; \
		exit 1; }
	$(PYTHON) -m venv --clear --without-pip $(VENV)
	@$(BIN)/python -m ensurepip >/dev/null 2>&1 || PIP_ROOT_USER_ACTION=ignore $(PYTHON) -m pip install \
		-qq --target "$$($(BIN)/python -c '$(PURELIB)')" pip
	PIP_CONSTRAINT=$(CONSTRAINTS) $(BIN)/python -m pip install -qq --upgrade pip
	PIP_CONSTRAINT=$(CONSTRAINTS) $(BIN)/python -m pip install -qq --editable ".[demo,redis]" --group dev
	touch $@

clean:
	rm -rf .venv* .nox

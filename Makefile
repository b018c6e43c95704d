# What people run. `make` alone lists it. CI calls these targets and nothing else.

# The server that `make run` starts and `make test` tests.
REDIS_SERVER ?= redis-server
export REDIS_SERVER PORT

# Where `make install` puts the library: packages set DESTDIR, a prefix of the prefix.
PREFIX ?= /usr/local
# Where `make dist` puts the archive.
DIST ?= dist
# The library that both take; another one than ours is taken as it is.
BUILT := target/release/libredis_limiter.$(if $(filter Darwin,$(shell uname -s)),dylib,so)
LIBRARY ?= $(BUILT)

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

setup: ## Install what is missing (through apt-get; elsewhere it says what to install)
	@scripts/setup

build: setup ## Build the module: target/release/libredis_limiter.so
	cargo build --release --locked

run: build ## Start a server with the module in the foreground (PORT=7000 chooses the port)
	@scripts/run

# What there is to say to it besides: scripts/top --help.
top: .venv/top ## Watch the limiters of a server (PORT= HOST= DB= INTERVAL= PREFIXES="a b")
	@.venv/bin/python scripts/top $(if $(PORT),--port $(PORT)) $(if $(HOST),--host $(HOST)) \
	  $(if $(DB),--db $(DB)) $(if $(INTERVAL),--interval $(INTERVAL)) -- $(PREFIXES)

.venv/top: scripts/top-requirements.txt
	@scripts/setup --python
	@[ -x .venv/bin/python ] || python3 -m venv .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# Servers refuse a library without the execute bit. `install` makes a new file, so a server that
# runs on the old one keeps it.
install: $(if $(filter $(BUILT),$(LIBRARY)),build) ## Install the library below PREFIX=/usr/local
	install -d "$(DESTDIR)$(PREFIX)/lib/redis/modules"
	install -m 755 "$(LIBRARY)" "$(DESTDIR)$(PREFIX)/lib/redis/modules/"

dist: $(if $(filter $(BUILT),$(LIBRARY)),build) ## Pack what a server needs into dist/, with checksums
	@scripts/dist "$(LIBRARY)" "$(DIST)"

# Some tests hold thousands of connections.
test: setup ## Run every test (REDIS_SERVER=/path/to/server tests on another server)
	ulimit -n "$$(ulimit -Hn)" && cargo test --locked
	@$(MAKE) --no-print-directory test-clients

test-clients: setup ## Run the tests of the Python client and of the example for Node.js alone
	@scripts/setup --clients
	@scripts/test-clients

test-servers: setup ## Run every test on each server that can be installed here
	@scripts/setup --servers
	@scripts/test-servers

# Tries of a few seconds are part of `make test`. The library is the one that is shipped, and the
# checker quick.
histories: setup ## Check histories of clients for linearizability (HISTORIES=n of each kind, SEED=n)
	ulimit -n "$$(ulimit -Hn)" && HISTORIES="$(or $(HISTORIES),500)" \
	  cargo test --release --locked --test linearizable -- --nocapture

# Thousands of waiters are as many connections.
bench: setup ## Measure the module beside the other ways (7 minutes; QUICK=1: one; ROUNDS=n)
	ulimit -n "$$(ulimit -Hn)" && cargo bench --locked --bench bench

memcheck: setup ## Run the tests with the servers under valgrind (for half an hour)
	@scripts/setup --memcheck
	@scripts/memcheck

MINUTES ?= 5
soak: setup ## Load a server, and see that nothing grows in it (MINUTES=5)
	MINUTES=$(MINUTES) cargo test --locked --test soak -- --nocapture

# Without link-time optimization, which takes longer than it saves here.
explore: setup ## Model check of the line, deeper than in `make test` (SECS=60 a scene, WALKS=100000)
	EXPLORE_SECONDS=$(or $(SECS),60) EXPLORE_WALKS=$(or $(WALKS),100000) \
	  CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
	  cargo test --locked --release --lib simulation -- --nocapture

# The first is a test, a longer one; the others are targets in fuzz/. No sanitizer: what they fuzz
# has no `unsafe`, and is faster without.
fuzz: setup ## Fuzz the commands on a server, then the pure parts (SECONDS=60 for each, SEED=n)
	@scripts/setup --fuzz
	ulimit -n "$$(ulimit -Hn)" && \
	  FUZZ_SECONDS=$(or $(SECONDS),60) cargo test --locked --test fuzz -- --nocapture
	for target in parse limiter queue; do \
	  cargo +nightly fuzz run --sanitizer none $$target -- \
	    -max_total_time=$(or $(SECONDS),60) -print_final_stats=1 || exit 1; \
	done

# Lines that only a newer server runs are counted with REDIS_SERVER= one.
coverage: setup ## Show which lines of src/ the tests run
	@scripts/setup --coverage
	@scripts/coverage

lint: setup ## Check format and clippy, warnings as errors
	cargo fmt --check
	cargo clippy --locked --all-targets -- --deny warnings
	cargo clippy --locked --example limiter_that_panics --features panic-hook -- --deny warnings
	cargo fmt --check --manifest-path fuzz/Cargo.toml

deny: setup ## Check licences, sources and known vulnerabilities of the dependencies
	@scripts/deny

mutants: setup ## Change the pure rules, one place at a time: a unit test must fail for each
	@scripts/mutants

variants: setup ## Break the module, one way at a time: a test must fail (VARIANT=word: some)
	ulimit -n "$$(ulimit -Hn)" && \
	  cargo test --locked --test variants -- --ignored --nocapture --test-threads 1

fmt: ## Format the code
	cargo fmt

clean: ## Remove what was built, downloaded and stored
	cargo clean
	rm -rf .servers .venv dist appendonlydir appendonlydir-* fuzz/artifacts fuzz/corpus fuzz/target
	rm -rf clients/python/.venv clients/python/build clients/python/*.egg-info \
		clients/node/node_modules

.PHONY: help setup build run top install dist test test-clients test-servers bench memcheck soak \
	explore histories fuzz coverage lint deny mutants variants fmt clean

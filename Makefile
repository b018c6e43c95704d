# What people run. `make` alone lists it. CI calls these targets and nothing else.

# The server that `make run` starts and `make test` tests.
REDIS_SERVER ?= redis-server
export REDIS_SERVER PORT

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

setup: ## Install what is missing (through apt-get; elsewhere it says what to install)
	@scripts/setup

build: setup ## Build the module: target/release/libredis_limiter.so
	cargo build --release --locked

run: build ## Start a server with the module in the foreground (PORT=7000 chooses the port)
	@scripts/run

# Some tests hold thousands of connections.
test: setup ## Run every test (REDIS_SERVER=/path/to/server tests on another server)
	ulimit -n "$$(ulimit -Hn)" && cargo test --locked

test-servers: setup ## Run every test on each server that can be installed here
	@scripts/setup --servers
	@scripts/test-servers

# Thousands of waiters are as many connections.
bench: setup ## Measure the module beside the other ways (7 minutes; QUICK=1: one; ROUNDS=n)
	ulimit -n "$$(ulimit -Hn)" && cargo bench --locked --bench bench

lint: setup ## Check format and clippy, warnings as errors
	cargo fmt --check
	cargo clippy --locked --all-targets -- --deny warnings

fmt: ## Format the code
	cargo fmt

clean: ## Remove what was built, downloaded and stored
	cargo clean
	rm -rf .servers appendonlydir appendonlydir-*

.PHONY: help setup build run test test-servers bench lint fmt clean

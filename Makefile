# One command each; every target is idempotent. `make help` lists them.
.PHONY: help setup build train test lint figures clean
.DEFAULT_GOAL := help

CARGO ?= cargo
NP ?= 2
# Where `make figures` leaves its raw results.
RUN ?= benches/runs/$(shell date +%F)-$(shell uname -n)
# Open MPI refuses to run as root, or with more ranks than cores, unless told.
MPIRUN = OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1 mpirun --oversubscribe --bind-to none -n $(NP)

help:
	@echo "make train   set up, build, and train configs/quickstart.toml on $(NP) MPI ranks"
	@echo "make build   set up and build target/release/lasp"
	@echo "make test    set up and run every test"
	@echo "make figures measure the README's figures from scratch into RUN=$(RUN), and write its table and docs/figures"
	@echo "make lint    formatting and clippy, warnings denied"

setup:
	@bash scripts/setup.sh

build: setup
	$(CARGO) build --release --package lasp

corpus.bin: | build
	target/release/lasp data prepare .venv/lib --glob '*.py' --out $@

train: corpus.bin
	$(MPIRUN) target/release/lasp train configs/quickstart.toml

test: setup
	$(CARGO) test --release --workspace

lint: setup
	$(CARGO) fmt --all -- --check
	$(CARGO) clippy --release --workspace --all-targets -- -D warnings

figures: corpus.bin
	$(CARGO) build --release --workspace
	target/release/figures measure $(RUN)
	target/release/figures write $(RUN)

clean:
	$(CARGO) clean

# SPDX-License-Identifier: Apache-2.0
# Names for what is in scripts/, which needs no make.

PREFIX = /usr/local
SYSCONFDIR = /etc
DESTDIR =

.PHONY: bench demo test test-engines test-security install uninstall

demo:
	scripts/demo

test:
	scripts/test

test-engines:
	scripts/test tests/engines

# With NVHOOK_SECURITY_SECONDS in the environment, the long races.
test-security:
	scripts/test tests/security $$(grep -o 'tests/test_[a-z_]*\.py' SECURITY.md | sort -u)

# RUNS=40 ROWS=gpu,no-request PEER=DIR JSON=FILE
bench: build/requirements.stamp
	/usr/bin/python3 tests/bench.py $(if $(RUNS),--runs $(RUNS)) $(if $(ROWS),--rows $(ROWS)) \
		$(if $(PEER),--peer $(PEER)) $(if $(REAL),--real) $(if $(JSON),--json $(JSON))

install: build/requirements.stamp
	scripts/install install '$(PREFIX)' '$(SYSCONFDIR)' '$(DESTDIR)'

uninstall:
	scripts/install uninstall '$(PREFIX)' '$(SYSCONFDIR)' '$(DESTDIR)'

build/requirements.stamp: requirements.txt
	scripts/setup

# SPDX-License-Identifier: Apache-2.0
# Names for what is in scripts/, which needs no make.

PREFIX = /usr/local
SYSCONFDIR = /etc
DESTDIR =

.PHONY: bench deb demo docs fuzz install man rpm sbom test test-engines test-security uninstall

demo:
	scripts/demo

test:
	scripts/test

test-engines:
	scripts/test tests/engines

# What an image could try, and what holds it. With NVHOOK_SECURITY_SECONDS in the environment, the long races.
test-security:
	scripts/test tests/security tests/test_audit.py $$(grep -o 'tests/test_[a-z_]*\.py' SECURITY.md | sort -u)

# SECONDS=3600: every reader of foreign input, on inputs that no other run has had
fuzz:
	NVHOOK_FUZZ_SECONDS=$(or $(SECONDS),600) scripts/test -q tests/security/test_fuzz.py tests/security/test_launcher.py -k "for_long or memory"

# RUNS=40 ROWS=gpu,no-request PEER=DIR LOW=crun JSON=FILE
bench: build/requirements.stamp
	/usr/bin/python3 tests/bench.py $(if $(RUNS),--runs $(RUNS)) $(if $(ROWS),--rows $(ROWS)) \
		$(if $(PEER),--peer $(PEER)) $(if $(LOW),--low $(LOW)) $(if $(REAL),--real) $(if $(JSON),--json $(JSON))

install: build/man/nvhook.1
	scripts/install install '$(PREFIX)' '$(SYSCONFDIR)' '$(DESTDIR)'

uninstall:
	scripts/install uninstall '$(PREFIX)' '$(SYSCONFDIR)' '$(DESTDIR)'

# the site, in build/site
docs: build/requirements.stamp
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build

# into build/dist; what the tools are called in Debian: dpkg-dev, rpm. ARCH=arm64: with gcc-aarch64-linux-gnu, on amd64
deb rpm: build/man/nvhook.1
	NVHOOK_ARCH=$(ARCH) packaging/build $@

sbom: build/requirements.stamp
	.venv/bin/python scripts/sbom.py build/dist

# from the commands' own words
man: build/man/nvhook.1

build/man/nvhook.1: build/requirements.stamp scripts/manpages.py $(wildcard docs/man/* hook/nvhook/cli.py hook/nvhook/commands/* hook/nvhook/commands/*/*)
	.venv/bin/python scripts/manpages.py build/man

build/requirements.stamp: requirements.txt
	scripts/setup

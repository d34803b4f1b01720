# SPDX-License-Identifier: Apache-2.0
# Names for what is in scripts/, which needs no make.

PREFIX = /usr/local
SYSCONFDIR = /etc
DESTDIR =

.PHONY: demo test test-engines install uninstall

demo:
	scripts/demo

test:
	scripts/test

test-engines:
	scripts/test tests/engines

install: build/requirements.stamp
	scripts/install install '$(PREFIX)' '$(SYSCONFDIR)' '$(DESTDIR)'

uninstall:
	scripts/install uninstall '$(PREFIX)' '$(SYSCONFDIR)' '$(DESTDIR)'

build/requirements.stamp: requirements.txt
	scripts/setup

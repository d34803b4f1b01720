# SPDX-License-Identifier: Apache-2.0
"""`nvhook info` and `nvhook list`: what the host has."""

# SPDX-License-Identifier: Apache-2.0
"""`nvhook doctor` and `nvhook snapshot`: what is wrong with the host, and its description."""

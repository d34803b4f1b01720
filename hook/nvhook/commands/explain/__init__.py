# SPDX-License-Identifier: Apache-2.0
"""`nvhook explain`: why a container gets what it gets, and whether it can use it."""

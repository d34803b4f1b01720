# SPDX-License-Identifier: Apache-2.0
"""`nvhook configure` and `nvhook config check`: configuration files, the engines' and ours."""

# SPDX-License-Identifier: Apache-2.0
"""`nvhook cdi`: the plan as a CDI specification, and what is wrong with those that are there."""

# SPDX-License-Identifier: Apache-2.0
"""nvidia-container-cli: NVIDIA's command, on the core's stages."""

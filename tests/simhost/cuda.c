/* SPDX-License-Identifier: Apache-2.0
 *
 * A stub of the CUDA driver library: it counts the GPUs of one simulated host that it can reach. Like the real one it
 * needs /dev/nvidia-uvm, which NVML does not.
 */

#include "gpus.h"

/* CUresult */
enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    UNKNOWN = 999,
};

static int initialized;

int cuInit(unsigned flags)
{
    if (flags)
        return INVALID_VALUE;
    if (control_fault() || reachable_gpus() == 0)
        return NO_DEVICE;
    if (!IS_WSL && access_fault("nvidia-uvm", 0, R_OK | W_OK))
        return UNKNOWN;
    initialized = 1;
    return SUCCESS;
}

int cuDriverGetVersion(int *version)
{
    *version = CUDA_VERSION;
    return SUCCESS;
}

int cuDeviceGetCount(int *count)
{
    if (!initialized)
        return NOT_INITIALIZED;
    *count = reachable_gpus();
    return SUCCESS;
}

int cuDeviceGet(int *device, int ordinal)
{
    if (!initialized)
        return NOT_INITIALIZED;
    if (ordinal < 0 || !reachable_gpu(ordinal))
        return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}

int cuDeviceGetName(char *name, int length, int device)
{
    const struct gpu *gpu = device < 0 ? NULL : reachable_gpu(device);

    if (!gpu)
        return INVALID_DEVICE;
    snprintf(name, length, "%s", gpu->name);
    return SUCCESS;
}

/* SPDX-License-Identifier: Apache-2.0
 *
 * A stub of NVML that knows the GPUs of one simulated host and reports those whose device nodes it can reach. A MIG
 * device needs the nodes of its GPU instance and its compute instance as well, as on a real host.
 */

#include "gpus.h"

/* nvmlReturn_t */
enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NO_PERMISSION = 4,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
};

typedef struct {
    char bus_id_legacy[16];
    unsigned domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
} pci_info;

typedef struct {
    unsigned version;
    unsigned long long total, reserved, free, used;
} memory_v2;

typedef struct {
    unsigned gpu, memory;
} utilization;

/* A handle points into gpus[] or into migs[]. */
typedef const void *handle;

static int users;

static const struct gpu *as_gpu(handle device)
{
    const struct gpu *gpu = device;

    return gpu >= gpus && gpu < gpus + GPU_COUNT ? gpu : NULL;
}

static const struct mig *as_mig(handle device)
{
    const struct mig *mig = device;

    return mig >= migs && mig < migs + MIG_COUNT ? mig : NULL;
}

static int mig_is_reachable(const struct mig *mig)
{
    return (mig->gi_cap < 0 || access_fault("nvidia-caps/nvidia-cap%d", mig->gi_cap, R_OK) == 0)
        && (mig->ci_cap < 0 || access_fault("nvidia-caps/nvidia-cap%d", mig->ci_cap, R_OK) == 0);
}

static int copy(char *to, unsigned size, const char *text)
{
    if (strlen(text) >= size)
        return INSUFFICIENT_SIZE;
    memcpy(to, text, strlen(text) + 1);
    return SUCCESS;
}

int nvmlInitWithFlags(unsigned flags)
{
    int fault = control_fault();

    (void)flags;
    if (fault)
        return fault == ENOENT ? DRIVER_NOT_LOADED : NO_PERMISSION;
    users++;
    return SUCCESS;
}

int nvmlInit_v2(void)
{
    return nvmlInitWithFlags(0);
}

int nvmlInit(void)
{
    return nvmlInitWithFlags(0);
}

int nvmlShutdown(void)
{
    if (!users)
        return UNINITIALIZED;
    users--;
    return SUCCESS;
}

const char *nvmlErrorString(int result)
{
    switch (result) {
    case SUCCESS: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NO_PERMISSION: return "Insufficient Permissions";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    default: return "Unknown Error";
    }
}

int nvmlSystemGetDriverVersion(char *version, unsigned length)
{
    return users ? copy(version, length, DRIVER_VERSION) : UNINITIALIZED;
}

int nvmlSystemGetNVMLVersion(char *version, unsigned length)
{
    char text[64];

    snprintf(text, sizeof text, "%d.%s", CUDA_VERSION / 1000, DRIVER_VERSION);
    return copy(version, length, text);
}

int nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    *version = CUDA_VERSION;
    return SUCCESS;
}

int nvmlSystemGetCudaDriverVersion(int *version)
{
    return nvmlSystemGetCudaDriverVersion_v2(version);
}

int nvmlDeviceGetCount_v2(unsigned *count)
{
    if (!users)
        return UNINITIALIZED;
    *count = reachable_gpus();
    return SUCCESS;
}

int nvmlDeviceGetCount(unsigned *count)
{
    return nvmlDeviceGetCount_v2(count);
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, handle *device)
{
    if (!users)
        return UNINITIALIZED;
    *device = reachable_gpu(index);
    return *device ? SUCCESS : INVALID_ARGUMENT;
}

int nvmlDeviceGetHandleByIndex(unsigned index, handle *device)
{
    return nvmlDeviceGetHandleByIndex_v2(index, device);
}

int nvmlDeviceGetHandleByUUID(const char *uuid, handle *device)
{
    if (!users)
        return UNINITIALIZED;
    for (const struct gpu *gpu = gpus; gpu < gpus + GPU_COUNT; gpu++)
        if (strcmp(gpu->uuid, uuid) == 0 && gpu_is_reachable(gpu)) {
            *device = gpu;
            return SUCCESS;
        }
    for (const struct mig *mig = migs; mig < migs + MIG_COUNT; mig++)
        if (strcmp(mig->uuid, uuid) == 0 && gpu_is_reachable(mig->parent) && mig_is_reachable(mig)) {
            *device = mig;
            return SUCCESS;
        }
    return NOT_FOUND;
}

int nvmlDeviceGetMinorNumber(handle device, unsigned *minor)
{
    const struct gpu *gpu = as_gpu(device);

    if (!gpu)
        return as_mig(device) ? NOT_SUPPORTED : INVALID_ARGUMENT;
    *minor = gpu->minor;
    return SUCCESS;
}

int nvmlDeviceGetIndex(handle device, unsigned *index)
{
    const struct gpu *gpu = as_gpu(device);

    if (!gpu)
        return as_mig(device) ? NOT_SUPPORTED : INVALID_ARGUMENT;
    for (*index = 0; reachable_gpu(*index); ++*index)
        if (reachable_gpu(*index) == gpu)
            return SUCCESS;
    return NOT_FOUND;
}

int nvmlDeviceGetPciInfo_v3(handle device, pci_info *pci)
{
    const struct gpu *gpu = as_gpu(device);

    if (!gpu)
        return as_mig(device) ? NOT_SUPPORTED : INVALID_ARGUMENT;
    memset(pci, 0, sizeof *pci);
    pci->domain = gpu->domain;
    pci->bus = gpu->bus;
    pci->device = gpu->device;
    pci->pci_device_id = gpu->pci_device_id;
    snprintf(pci->bus_id_legacy, sizeof pci->bus_id_legacy, "%04X:%02X:%02X.0", gpu->domain, gpu->bus, gpu->device);
    snprintf(pci->bus_id, sizeof pci->bus_id, "%08X:%02X:%02X.0", gpu->domain, gpu->bus, gpu->device);
    return SUCCESS;
}

int nvmlDeviceGetUUID(handle device, char *uuid, unsigned length)
{
    const struct gpu *gpu = as_gpu(device);
    const struct mig *mig = as_mig(device);

    if (!gpu && !mig)
        return INVALID_ARGUMENT;
    return copy(uuid, length, gpu ? gpu->uuid : mig->uuid);
}

int nvmlDeviceGetName(handle device, char *name, unsigned length)
{
    const struct gpu *gpu = as_gpu(device);
    const struct mig *mig = as_mig(device);
    char text[256];

    if (!gpu && !mig)
        return INVALID_ARGUMENT;
    if (gpu)
        return copy(name, length, gpu->name);
    snprintf(text, sizeof text, "%s MIG %s", mig->parent->name, mig->profile);
    return copy(name, length, text);
}

int nvmlDeviceGetBrand(handle device, int *brand)
{
    const struct gpu *gpu = as_gpu(device);

    if (!gpu)
        return as_mig(device) ? NOT_SUPPORTED : INVALID_ARGUMENT;
    *brand = gpu->brand;
    return SUCCESS;
}

int nvmlDeviceGetCudaComputeCapability(handle device, int *major, int *minor)
{
    const struct mig *mig = as_mig(device);
    const struct gpu *gpu = mig ? mig->parent : as_gpu(device);

    if (!gpu)
        return INVALID_ARGUMENT;
    *major = gpu->major_capability;
    *minor = gpu->minor_capability;
    return SUCCESS;
}

int nvmlDeviceGetMigMode(handle device, unsigned *current, unsigned *pending)
{
    const struct gpu *gpu = as_gpu(device);

    if (!gpu)
        return INVALID_ARGUMENT;
    if (gpu->mig < 0)
        return NOT_SUPPORTED;
    *current = *pending = gpu->mig;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(handle device, unsigned *count)
{
    const struct gpu *gpu = as_gpu(device);

    if (!gpu)
        return INVALID_ARGUMENT;
    *count = gpu->mig < 0 ? 0 : 7;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(handle device, unsigned index, handle *found)
{
    const struct gpu *gpu = as_gpu(device);

    if (!gpu)
        return INVALID_ARGUMENT;
    if (gpu->mig < 0)
        return NOT_SUPPORTED;
    for (const struct mig *mig = migs; mig < migs + MIG_COUNT; mig++)
        if (mig->parent == gpu && mig_is_reachable(mig) && index-- == 0) {
            *found = mig;
            return SUCCESS;
        }
    return NOT_FOUND;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle device, handle *parent)
{
    const struct mig *mig = as_mig(device);

    if (!mig)
        return INVALID_ARGUMENT;
    *parent = mig->parent;
    return SUCCESS;
}

int nvmlDeviceIsMigDeviceHandle(handle device, unsigned *is_mig)
{
    *is_mig = as_mig(device) != NULL;
    return SUCCESS;
}

int nvmlDeviceGetGpuInstanceId(handle device, unsigned *id)
{
    const struct mig *mig = as_mig(device);

    if (!mig)
        return as_gpu(device) ? NOT_SUPPORTED : INVALID_ARGUMENT;
    *id = mig->gi;
    return SUCCESS;
}

int nvmlDeviceGetComputeInstanceId(handle device, unsigned *id)
{
    const struct mig *mig = as_mig(device);

    if (!mig)
        return as_gpu(device) ? NOT_SUPPORTED : INVALID_ARGUMENT;
    *id = mig->ci;
    return SUCCESS;
}

/* The values of the moment do not change: what is printed of a simulated host is the same every time. */

int nvmlDeviceGetMemoryInfo_v2(handle device, memory_v2 *memory)
{
    const struct gpu *gpu = as_gpu(device);
    const struct mig *mig = as_mig(device);

    if (!gpu && !mig)
        return INVALID_ARGUMENT;
    memory->total = gpu ? gpu->memory_total : mig->memory_total;
    memory->used = gpu ? gpu->memory_used : mig->memory_used;
    memory->reserved = 0;
    memory->free = memory->total - memory->used;
    return memory->total ? SUCCESS : NOT_SUPPORTED;
}

int nvmlDeviceGetUtilizationRates(handle device, utilization *rates)
{
    const struct gpu *gpu = as_gpu(device);

    if (!gpu)
        return as_mig(device) ? NOT_SUPPORTED : INVALID_ARGUMENT;
    if (gpu->load < 0 || gpu->mig == 1)
        return NOT_SUPPORTED;
    rates->gpu = gpu->load;
    rates->memory = gpu->load / 2;
    return SUCCESS;
}

int nvmlDeviceGetTemperature(handle device, int sensor, unsigned *temperature)
{
    const struct gpu *gpu = as_gpu(device);

    if (!gpu || sensor != 0)
        return as_mig(device) ? NOT_SUPPORTED : INVALID_ARGUMENT;
    if (gpu->temperature < 0)
        return NOT_SUPPORTED;
    *temperature = gpu->temperature;
    return SUCCESS;
}

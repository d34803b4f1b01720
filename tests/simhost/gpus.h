/* SPDX-License-Identifier: Apache-2.0
 *
 * The GPUs of a simulated host, for its stubs of NVML and CUDA: which there are (host.h, written for each host) and
 * which of them this process can reach.
 */

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct gpu {
    unsigned minor;
    const char *name;
    const char *uuid;
    unsigned domain, bus, device, pci_device_id;
    unsigned major_capability, minor_capability;
    int brand;
    int mig; /* -1 not supported, 0 disabled, 1 enabled */
    unsigned long long memory_total, memory_used; /* bytes; 0 in all: NVML does not tell */
    int load, temperature; /* percent, degrees Celsius; -1: NVML does not tell */
};

struct mig {
    const struct gpu *parent;
    unsigned gi, ci;
    const char *profile;
    const char *uuid;
    unsigned long long memory_total, memory_used;
    int gi_cap, ci_cap; /* minors of the nodes below /dev/nvidia-caps, -1 where the host does not tell */
};

/* DRIVER_VERSION, CUDA_VERSION, IS_WSL, GPU_COUNT, gpus[], MIG_COUNT, migs[], the last two in NVML's order. An empty array is
 * no C, so each has one entry more than its count. */
#include "host.h"

static const char *node_path(char *path, size_t size, const char *format, int number)
{
    const char *directory = getenv("NVHOOK_SIM_DEV"); /* for tests on the host, where /dev is not ours */
    int length = snprintf(path, size, "%s/", directory ? directory : "/dev");

    snprintf(path + length, size - length, format, number);
    return path;
}

/* 0 when the kernel would let us through to a driver, whether or not there is one behind the node, else errno. */
static int open_fault(const char *format, int number)
{
    char path[512];
    int fd = open(node_path(path, sizeof path, format, number), O_RDWR | O_CLOEXEC);

    if (fd >= 0) {
        close(fd);
        return 0;
    }
    return errno == ENXIO || errno == ENODEV || errno == EIO ? 0 : errno;
}

/* The same for nodes with a major number that the kernel gives out: there another driver of this machine may be behind
 * it (a watchdog, say, which an open would start), so ask without opening. The device cgroup answers access(2) too. */
static int access_fault(const char *format, int number, int mode)
{
    char path[512];

    return access(node_path(path, sizeof path, format, number), mode) == 0 ? 0 : errno;
}

/* On WSL 2 one node is the way to everything. */
static int control_fault(void)
{
    return IS_WSL ? access_fault("dxg", 0, R_OK | W_OK) : open_fault("nvidiactl", 0);
}

static int gpu_is_reachable(const struct gpu *gpu)
{
    return (IS_WSL ? control_fault() : open_fault("nvidia%d", gpu->minor)) == 0;
}

static const struct gpu *reachable_gpu(unsigned index)
{
    for (const struct gpu *gpu = gpus; gpu < gpus + GPU_COUNT; gpu++)
        if (gpu_is_reachable(gpu) && index-- == 0)
            return gpu;
    return NULL;
}

static unsigned reachable_gpus(void)
{
    unsigned count = 0;

    while (reachable_gpu(count))
        count++;
    return count;
}

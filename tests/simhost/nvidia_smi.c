/* SPDX-License-Identifier: Apache-2.0
 *
 * The nvidia-smi of a simulated host. It finds NVML through the dynamic linker and says what NVML says: with -L a line
 * for each GPU, without arguments a table. Exit codes are the real program's.
 */

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void *handle;

static int (*init)(void);
static const char *(*error_string)(int);
static int (*driver_version)(char *, unsigned);
static int (*cuda_version)(int *);
static int (*count_gpus)(unsigned *);
static int (*gpu_by_index)(unsigned, handle *);
static int (*get_name)(handle, char *, unsigned);
static int (*get_uuid)(handle, char *, unsigned);
static int (*max_migs)(handle, unsigned *);
static int (*mig_by_index)(handle, unsigned, handle *);

static const struct {
    const char *name;
    void *address;
} functions[] = {
    {"nvmlInit_v2", &init},
    {"nvmlErrorString", &error_string},
    {"nvmlSystemGetDriverVersion", &driver_version},
    {"nvmlSystemGetCudaDriverVersion_v2", &cuda_version},
    {"nvmlDeviceGetCount_v2", &count_gpus},
    {"nvmlDeviceGetHandleByIndex_v2", &gpu_by_index},
    {"nvmlDeviceGetName", &get_name},
    {"nvmlDeviceGetUUID", &get_uuid},
    {"nvmlDeviceGetMaxMigDeviceCount", &max_migs},
    {"nvmlDeviceGetMigDeviceHandleByIndex", &mig_by_index},
};

static int load_nvml(void)
{
    void *library = dlopen("libnvidia-ml.so.1", RTLD_NOW);

    if (!library)
        return 0;
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        void *found = dlsym(library, functions[i].name);

        if (!found)
            return 0;
        memcpy(functions[i].address, &found, sizeof found);
    }
    return 1;
}

static void list_migs(handle gpu)
{
    char name[256], uuid[96];
    unsigned most = 0;
    handle mig;

    max_migs(gpu, &most);
    for (unsigned i = 0; i < most && mig_by_index(gpu, i, &mig) == 0; i++) {
        const char *profile;

        get_name(mig, name, sizeof name);
        get_uuid(mig, uuid, sizeof uuid);
        profile = strstr(name, " MIG ");
        printf("  MIG %-11s Device %2u: (UUID: %s)\n", profile ? profile + 5 : name, i, uuid);
    }
}

static int list(unsigned count)
{
    char name[256], uuid[96];
    handle gpu;

    if (count == 0)
        printf("No devices found.\n");
    for (unsigned i = 0; i < count && gpu_by_index(i, &gpu) == 0; i++) {
        get_name(gpu, name, sizeof name);
        get_uuid(gpu, uuid, sizeof uuid);
        printf("GPU %u: %s (UUID: %s)\n", i, name, uuid);
        list_migs(gpu);
    }
    return 0;
}

static int table(unsigned count)
{
    const char *rule = "+-----------------------------------------------------------------------------+\n";
    char version[96] = "", cuda[32], name[256], uuid[96];
    int number = 0;
    handle gpu;

    if (count == 0) {
        printf("No devices were found\n");
        return 6;
    }
    driver_version(version, sizeof version);
    cuda_version(&number);
    snprintf(cuda, sizeof cuda, "%d.%d", number / 1000, number % 1000 / 10);
    printf("%s| NVIDIA-SMI %-12s  Driver Version: %-12s  CUDA Version: %-6s |\n%s", rule, version, version, cuda, rule);
    for (unsigned i = 0; i < count && gpu_by_index(i, &gpu) == 0; i++) {
        get_name(gpu, name, sizeof name);
        get_uuid(gpu, uuid, sizeof uuid);
        printf("| %3u  %-28s %41s |\n", i, name, uuid);
    }
    printf("%s", rule);
    return 0;
}

static int run(int argc, char **argv)
{
    unsigned count = 0;
    int result;

    if (!load_nvml()) {
        printf("NVIDIA-SMI couldn't find libnvidia-ml.so library in your system. Please make sure that the NVIDIA "
               "Display Driver is properly installed and present in your system.\nPlease also try adding directory "
               "that contains libnvidia-ml.so to your system PATH.\n");
        return 12;
    }
    result = init();
    if (result == 9) {
        printf("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the "
               "latest NVIDIA driver is installed and running.\n\n");
        return 9;
    }
    if (result) {
        printf("Failed to initialize NVML: %s\n", error_string(result));
        return result;
    }
    count_gpus(&count);
    if (argc == 1)
        return table(count);
    if (strcmp(argv[1], "-L") == 0 || strcmp(argv[1], "--list-gpus") == 0)
        return list(count);
    printf("Invalid combination of input arguments. Please run 'nvidia-smi -h' for help.\n\n");
    return 2;
}

/* There is no start-up code of the build machine's C library in this program (build.py says why). The kernel leaves
 * argc and argv on the stack; the C library has set itself up when the dynamic linker loaded it. */
__attribute__((used)) static void start(long *stack)
{
    exit(run((int)stack[0], (char **)(stack + 1)));
}

#if defined(__x86_64__)
__asm__(".globl _start\n_start:\n xor %ebp, %ebp\n mov %rsp, %rdi\n and $-16, %rsp\n call start\n hlt\n");
#elif defined(__aarch64__)
__asm__(".globl _start\n_start:\n mov x29, 0\n mov x30, 0\n mov x0, sp\n bl start\n brk 0\n");
#else
#error "simulated hosts run on x86-64 and aarch64"
#endif

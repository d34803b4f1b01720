/* SPDX-License-Identifier: Apache-2.0
 *
 * Asks the loaders of Vulkan and EGL for the GPUs, as a program without a display does. One line each; exit status 1 if
 * one of them finds no GPU of NVIDIA's. Nothing but the C library is needed to build it: the few declarations are here.
 */

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

/* vulkan_core.h */
struct instance_info {
    int type;
    const void *next;
    uint32_t flags;
    const void *application;
    uint32_t layer_count;
    const char *const *layers;
    uint32_t extension_count;
    const char *const *extensions;
};

enum { INSTANCE_CREATE_INFO = 1, VENDOR_NVIDIA = 0x10DE };

/* Longer than VkPhysicalDeviceProperties ever was; the name comes behind five numbers. */
struct properties {
    uint32_t api, driver, vendor, device, type;
    char name[256];
    char rest[4096];
};

static int vulkan(void)
{
    void *library = dlopen("libvulkan.so.1", RTLD_NOW), *instance, *devices[16];
    struct instance_info info = {INSTANCE_CREATE_INFO, NULL, 0, NULL, 0, NULL, 0, NULL};
    struct properties properties;
    uint32_t count = 16;
    int found = 0, fault;

    if (!library) {
        printf("vulkan: %s\n", dlerror());
        return 0;
    }
    int (*create)(const void *, const void *, void **) = dlsym(library, "vkCreateInstance");
    int (*enumerate)(void *, uint32_t *, void **) = dlsym(library, "vkEnumeratePhysicalDevices");
    void (*describe)(void *, struct properties *) = dlsym(library, "vkGetPhysicalDeviceProperties");
    if ((fault = create(&info, NULL, &instance)) || (fault = enumerate(instance, &count, devices))) {
        printf("vulkan: VkResult %d\n", fault);
        return 0;
    }
    for (uint32_t i = 0; i < count; i++) {
        describe(devices[i], &properties);
        if (properties.vendor == VENDOR_NVIDIA) {
            printf("vulkan: %s\n", properties.name);
            found = 1;
        }
    }
    return found;
}

/* egl.h, eglext.h */
enum { PLATFORM_DEVICE = 0x313F, VENDOR = 0x3053 };

static int egl(void)
{
    void *library = dlopen("libEGL.so.1", RTLD_NOW), *devices[16];
    int count = 0, found = 0;

    if (!library) {
        printf("egl: %s\n", dlerror());
        return 0;
    }
    void *(*get)(const char *) = dlsym(library, "eglGetProcAddress");
    unsigned (*initialize)(void *, int *, int *) = dlsym(library, "eglInitialize");
    const char *(*ask)(void *, int) = dlsym(library, "eglQueryString");
    unsigned (*query)(int, void **, int *) = get("eglQueryDevicesEXT");
    void *(*display_of)(int, void *, const int *) = get("eglGetPlatformDisplayEXT");
    if (!query || !display_of || !query(16, devices, &count))
        count = 0;
    for (int i = 0; i < count; i++) {
        void *display = display_of(PLATFORM_DEVICE, devices[i], NULL);
        const char *vendor = display && initialize(display, NULL, NULL) ? ask(display, VENDOR) : NULL;

        if (vendor && strcmp(vendor, "NVIDIA") == 0) {
            printf("egl: device %d of %s\n", i, vendor);
            found = 1;
        }
    }
    if (!found)
        printf("egl: %d devices, none of NVIDIA's\n", count);
    return found;
}

int main(void)
{
    int by_vulkan = vulkan(), by_egl = egl();

    return !(by_vulkan && by_egl);
}

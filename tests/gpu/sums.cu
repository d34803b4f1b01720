// SPDX-License-Identifier: Apache-2.0
// Adds two vectors on every GPU it finds and compares each sum with the processor's. Prints one line a GPU.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include <cuda_runtime.h>

#define CHECK(call)                                                                     \
    do {                                                                                \
        cudaError_t status = (call);                                                    \
        if (status != cudaSuccess) {                                                    \
            std::printf("%s: %s\n", #call, cudaGetErrorString(status));                 \
            std::exit(1);                                                               \
        }                                                                               \
    } while (0)

__global__ void add(const int *a, const int *b, int *sum, int count)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count)
        sum[i] = a[i] + b[i];
}

int main()
{
    const int count = 1 << 22;
    std::vector<int> a(count), b(count), sum(count, -1);
    std::srand(20260101);
    for (int i = 0; i < count; i++) {
        a[i] = std::rand() % 1000000;
        b[i] = std::rand() % 1000000;
    }
    int gpus = 0;
    CHECK(cudaGetDeviceCount(&gpus));
    for (int gpu = 0; gpu < gpus; gpu++) {
        int *on_gpu[3];
        const size_t bytes = count * sizeof(int);
        CHECK(cudaSetDevice(gpu));
        for (int **pointer : {&on_gpu[0], &on_gpu[1], &on_gpu[2]})
            CHECK(cudaMalloc(pointer, bytes));
        CHECK(cudaMemcpy(on_gpu[0], a.data(), bytes, cudaMemcpyHostToDevice));
        CHECK(cudaMemcpy(on_gpu[1], b.data(), bytes, cudaMemcpyHostToDevice));
        add<<<(count + 255) / 256, 256>>>(on_gpu[0], on_gpu[1], on_gpu[2], count);
        CHECK(cudaGetLastError());
        CHECK(cudaMemcpy(sum.data(), on_gpu[2], bytes, cudaMemcpyDeviceToHost));
        int wrong = 0;
        for (int i = 0; i < count; i++)
            wrong += sum[i] != a[i] + b[i];
        cudaDeviceProp properties;
        CHECK(cudaGetDeviceProperties(&properties, gpu));
        std::printf("GPU %d: %s: %d sums, %d wrong\n", gpu, properties.name, count, wrong);
        if (wrong)
            return 1;
    }
    return gpus ? 0 : 1;
}

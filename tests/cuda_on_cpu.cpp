// Runs the kernel of norm.cu on a CPU: one block after the other, a thread of the machine for each of the block's.
// Reads from standard input: batch groups each pixels eps adaptive, then x, weight, bias (scale, shift); writes y. All float32, binary.
#include <barrier>
#include <cmath>
#include <cstdio>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __shared__
struct Index { unsigned x; };
static thread_local Index threadIdx;
static Index blockIdx, blockDim;
static std::unique_ptr<std::barrier<>> together;
static void __syncthreads() { together->arrive_and_wait(); }
static float rsqrtf(float v) { return 1 / std::sqrt(v); }
float shared[1 << 16];

#include "norm.cu"

static std::vector<float> read(size_t count) {
    std::vector<float> values(count);
    if (fread(values.data(), sizeof(float), count, stdin) != count) throw 1;
    return values;
}

int main() {
    const auto header = read(6);
    const int batch = header[0], groups = header[1], each = header[2], pixels = header[3];
    const bool adaptive = header[5] != 0;
    const size_t channels = (size_t)groups * each, size = batch * channels * pixels;
    const auto x = read(size), weight = read(channels), bias = read(channels);
    const auto scale = read(adaptive ? batch * channels : 0), shift = read(adaptive ? batch * channels : 0);
    std::vector<float> y(size, NAN);
    blockDim.x = 16;
    together = std::make_unique<std::barrier<>>(blockDim.x);
    for (blockIdx.x = 0; blockIdx.x < (unsigned)(batch * groups); blockIdx.x++) {
        std::vector<std::thread> threads;
        for (unsigned t = 0; t < blockDim.x; t++)
            threads.emplace_back([&, t] {
                threadIdx.x = t;
                group_norm_silu<float>(x.data(), y.data(), weight.data(), bias.data(), adaptive ? scale.data() : nullptr,
                                       adaptive ? shift.data() : nullptr, groups, each, pixels, header[4]);
            });
        for (auto& thread : threads) thread.join();
    }
    fwrite(y.data(), sizeof(float), size, stdout);
}

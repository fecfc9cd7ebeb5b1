// group_norm_silu in CUDA C++: the result of _by_groups in norm.py by another way, forward only, for contiguous pictures.
// cmlab.kernels.twin compiles it with nvcc when it is first called, and calls group_norm_silu_launch through its C interface.

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

// The sum over all threads of a block (a power of two many), known to each of them. partial: one float a thread, shared.
__device__ float sum_over_block(float value, float* partial) {
    partial[threadIdx.x] = value;
    __syncthreads();
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
        __syncthreads();
    }
    float total = partial[0];
    __syncthreads();  // before anybody writes again
    return total;
}

// One block a group, which stays in shared memory between its statistics and its result: x is read once.
// x, y (B, groups, each, pixels); weight, bias (groups * each); scale, shift (B, groups * each) or null.
template <typename T>
__global__ void group_norm_silu(const T* x, T* y, const T* weight, const T* bias, const T* scale, const T* shift,
                                int groups, int each, int pixels, float eps) {
    extern __shared__ float shared[];
    float *partial = shared, *group = shared + blockDim.x;
    const int size = each * pixels, first = blockIdx.x % groups * each;           // first: this group's first channel
    const long long start = (long long)blockIdx.x * size;
    const long long image = (long long)(blockIdx.x / groups) * groups * each;     // where this image's scale and shift begin

    float sum = 0;
    for (int i = threadIdx.x; i < size; i += blockDim.x) sum += group[i] = static_cast<float>(x[start + i]);
    const float mean = sum_over_block(sum, partial) / size;

    float squares = 0;
    for (int i = threadIdx.x; i < size; i += blockDim.x) squares += (group[i] - mean) * (group[i] - mean);
    const float rstd = rsqrtf(sum_over_block(squares, partial) / size + eps);

    for (int i = threadIdx.x; i < size; i += blockDim.x) {
        const int channel = first + i / pixels;
        float slope = static_cast<float>(weight[channel]), offset = static_cast<float>(bias[channel]);
        if (scale) {
            const float grown = 1 + static_cast<float>(scale[image + channel]);
            slope *= grown;
            offset = offset * grown + static_cast<float>(shift[image + channel]);
        }
        const float h = (group[i] - mean) * rstd * slope + offset;
        y[start + i] = static_cast<T>(h / (1 + expf(-h)));
    }
}

#ifdef __CUDACC__
template <typename T>
static cudaError_t launch(const void* x, void* y, const void* weight, const void* bias, const void* scale, const void* shift,
                          int batch, int groups, int each, int pixels, float eps, cudaStream_t stream) {
    const int threads = 256;
    const size_t bytes = (threads + (size_t)each * pixels) * sizeof(float);
    cudaError_t error = cudaFuncSetAttribute(group_norm_silu<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (error != cudaSuccess) return error;
    group_norm_silu<T><<<batch * groups, threads, bytes, stream>>>(
        (const T*)x, (T*)y, (const T*)weight, (const T*)bias, (const T*)scale, (const T*)shift, groups, each, pixels, eps);
    return cudaGetLastError();
}

// kind: 0 float, 1 half, 2 bfloat16. Returns a cudaError_t, 0 for success.
extern "C" int group_norm_silu_launch(int kind, const void* x, void* y, const void* weight, const void* bias, const void* scale,
                                      const void* shift, int batch, int groups, int each, int pixels, float eps, void* stream) {
    const auto call = kind == 0 ? launch<float> : kind == 1 ? launch<__half> : launch<__nv_bfloat16>;
    return call(x, y, weight, bias, scale, shift, batch, groups, each, pixels, eps, (cudaStream_t)stream);
}
#endif

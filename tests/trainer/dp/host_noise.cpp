// noise.cu on a CPU, as one thread of one block: writes what its kernels make of the tensor 0, 0.001, 0.002, ...
//     host_noise ELEMENTS STD SCALE KEY_WORD*8 > float32 values, then float64 ones

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
using std::fma;
using std::log;
using std::sqrt;
template <typename T> static T min(T a, T b) { return a < b ? a : b; }
static struct { unsigned x; } threadIdx{0}, blockIdx{0}, blockDim{1}, gridDim{1};
static void __syncthreads() {}
static unsigned __byte_perm(unsigned word, unsigned, unsigned) { return __builtin_bswap32(word); }
static void sincospi(double x, double *s, double *c) {
    const long double angle = 3.14159265358979323846264338327950288L * x;
    *s = (double)sinl(angle);
    *c = (double)cosl(angle);
}

#include "noise.cu"

int main(int, char **arguments) {
    const size_t count = strtoull(arguments[1], nullptr, 10);
    const double std = atof(arguments[2]), scale = atof(arguments[3]);
    Key key;
    for (int i = 0; i < 8; ++i) key.words[i] = (u32)strtoul(arguments[4 + i], nullptr, 16);
    std::vector<float> narrow(count);
    for (size_t i = 0; i < count; ++i) narrow[i] = 0.001f * (float)i;
    std::vector<double> wide(narrow.begin(), narrow.end());
    add_noise_float(narrow.data(), count, key, std, scale);
    add_noise_double(wide.data(), count, key, std, scale);
    fwrite(narrow.data(), sizeof(float), count, stdout);
    fwrite(wide.data(), sizeof(double), count, stdout);
}

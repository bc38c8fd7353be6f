// One launch adds N(0, std²) to a tensor and divides it: the normals of `JobRandomness.add_noise_`, drawn on the GPU.
//
// The bits are the same AES-256-CTR keystream (FIPS 197, SP 800-38A) from counter zero, cut into the same chunks; the
// transform is float64 Box-Muller with CUDA's logarithm, root, sine and cosine, within two last places of the CPU's.

typedef unsigned int u32;
typedef unsigned long long u64;

#define CHUNK 65536u        // elements, as _CHUNK in randomness.py
#define LANES 32u           // copies of the table, one for each bank of shared memory: no access waits, whatever the key
#define ROUNDS 14

__device__ __forceinline__ u32 rotated(u32 word, int bits) { return (word << bits) | (word >> (32 - bits)); }

// x · y in AES' field, modulo x⁸ + x⁴ + x³ + x + 1.
__device__ u32 product(u32 x, u32 y) {
    u32 sum = 0;
    for (int bit = 0; bit < 8; ++bit, x = (x << 1) ^ ((x >> 7) * 0x11b)) sum ^= ((y >> bit) & 1) * x;
    return sum;
}

// AES' S-box from its definition (FIPS 197, 5.1.1): the inverse, x²⁵⁴, and an affine map.
__device__ u32 substitute(u32 x) {
    u32 inverse = 1, square = x;
    for (int bit = 1; bit < 8; ++bit) inverse = product(inverse, square = product(square, square));
    u32 turned = inverse * 0x01010101u;  // rotations of a byte, in a word of four
    return (turned ^ rotated(turned, 1) ^ rotated(turned, 2) ^ rotated(turned, 3) ^ rotated(turned, 4) ^ 0x63) & 255;
}

// Columns are little-endian words. Row 0's contribution to a mixed column; those of other rows are rotations of it.
__device__ __forceinline__ u32 mixed(u32 s) { return product(s, 2) | (s << 8) | (s << 16) | (product(s, 3) << 24); }

__device__ __forceinline__ u32 substituted(u32 word, const u32 *table, u32 lane) {
    u32 out = 0;
    for (int row = 0; row < 4; ++row) out |= ((table[((word >> 8 * row) & 255) * LANES + lane] >> 8) & 255) << 8 * row;
    return out;
}

// The 60 words of AES-256's key schedule (FIPS 197, 5.2).
__device__ void expand(const u32 *key, u32 *schedule, const u32 *table, u32 lane) {
    u32 constant = 1;
    for (int i = 0; i < 8; ++i) schedule[i] = key[i];
    for (int i = 8; i < 4 * (ROUNDS + 1); ++i) {
        u32 word = schedule[i - 1];
        if (i % 8 == 0) {
            word = substituted(rotated(word, 24), table, lane) ^ constant;
            constant <<= 1;
        } else if (i % 8 == 4) {
            word = substituted(word, table, lane);
        }
        schedule[i] = schedule[i - 8] ^ word;
    }
}

// Block `index` of the keystream: 64-bit words 2·index and 2·index + 1, little-endian.
__device__ __forceinline__ void block(u64 index, const u32 *schedule, const u32 *table, u32 lane, u64 *words) {
    u32 state[4] = {0, 0, __byte_perm((u32)(index >> 32), 0, 0x0123), __byte_perm((u32)index, 0, 0x0123)}, next[4];
    for (int column = 0; column < 4; ++column) state[column] ^= schedule[column];
    for (int round = 1; round < ROUNDS; ++round) {
#pragma unroll
        for (int column = 0; column < 4; ++column) {
            u32 mix = schedule[4 * round + column];
#pragma unroll
            for (int row = 0; row < 4; ++row) {
                u32 entry = table[((state[(column + row) & 3] >> 8 * row) & 255) * LANES + lane];
                mix ^= row ? rotated(entry, 8 * row) : entry;
            }
            next[column] = mix;
        }
#pragma unroll
        for (int column = 0; column < 4; ++column) state[column] = next[column];
    }
#pragma unroll
    for (int column = 0; column < 4; ++column) {
        u32 shifted = 0;
#pragma unroll
        for (int row = 0; row < 4; ++row) shifted |= state[(column + row) & 3] & (255u << 8 * row);
        next[column] = substituted(shifted, table, lane) ^ schedule[4 * ROUNDS + column];
    }
    words[0] = next[0] | (u64)next[1] << 32;
    words[1] = next[2] | (u64)next[3] << 32;
}

// Two words to two normals of one standard deviation. The uniforms are (k + ½)·2⁻⁵³ of a word's upper 53 bits k.
__device__ __forceinline__ void box_muller(u64 radius_word, u64 angle_word, double factor, double *cosine, double *sine) {
    double uniform = fma((double)(radius_word >> 11), 0x1p-53, 0x1p-54);
    double radius = sqrt(factor * log(uniform));
    long long turn = (long long)(angle_word >> 11);
    long long quarter = (turn + (1ll << 50)) >> 51;  // 0 to 4; the rest is an eighth of a turn at most, and exact
    double rest = ((double)(turn - (quarter << 51)) + 0.5) * 0x1p-52;  // in halves of a turn
    double s, c;
    sincospi(rest, &s, &c);
    *cosine = radius * (quarter & 1 ? (quarter & 2 ? s : -s) : (quarter & 2 ? -c : c));
    *sine = radius * (quarter & 1 ? (quarter & 2 ? -c : c) : (quarter & 2 ? -s : s));
}

// A chunk of 2h normals (one more than it has elements, if these are odd) takes its radii from its first h words, its
// angles from its last; its first h normals are cosines. An item is two neighbouring radii of a chunk.
template <typename T>
__device__ __forceinline__ void noise(T *values, u64 count, const u32 *key, double std, double scale) {
    __shared__ u32 table[256 * LANES];
    __shared__ u32 schedule[4 * (ROUNDS + 1)];
    for (u32 entry = threadIdx.x; entry < 256; entry += blockDim.x) {
        u32 mix = mixed(substitute(entry));
        for (u32 lane = 0; lane < LANES; ++lane) table[entry * LANES + lane] = mix;
    }
    __syncthreads();
    if (threadIdx.x == 0) expand(key, schedule, table, 0);
    __syncthreads();
    const u32 lane = threadIdx.x % LANES;
    const u64 chunks = count / CHUNK, rest = count % CHUNK;
    const u64 items = chunks * (CHUNK / 4) + ((rest + 1) / 2 + 1) / 2;
    for (u64 item = blockIdx.x * (u64)blockDim.x + threadIdx.x; item < items; item += (u64)gridDim.x * blockDim.x) {
        const u64 start = item / (CHUNK / 4) * CHUNK, length = min((u64)CHUNK, count - start);
        const u64 half = (length + 1) / 2, first = item % (CHUNK / 4) * 2;
        u64 radii[2], angles[2];
        block((start + first) / 2, schedule, table, lane, radii);
        block((start + half + first) / 2, schedule, table, lane, angles);
        if (half & 1) {  // only in the last chunk: the angles' words lie across two blocks
            u64 after[2];
            block((start + half + first) / 2 + 1, schedule, table, lane, after);
            angles[0] = angles[1];
            angles[1] = after[0];
        }
#pragma unroll
        for (u32 pair = 0; pair < 2; ++pair) {
            if (first + pair >= half) break;
            const u64 at = start + first + pair;
            double normals[2];
            box_muller(radii[pair], angles[pair], -2.0 * std * std, normals, normals + 1);
            values[at] = (T)(((double)values[at] + normals[0]) * scale);
            if (first + pair + half < length) values[at + half] = (T)(((double)values[at + half] + normals[1]) * scale);
        }
    }
}

struct Key { u32 words[8]; };

#define KERNEL(NAME, T)                                                                                                \
    extern "C" __global__ void NAME(T *values, u64 count, Key key, double std, double scale) {                         \
        noise(values, count, key.words, std, scale);                                                                   \
    }

KERNEL(add_noise_float, float)
KERNEL(add_noise_double, double)

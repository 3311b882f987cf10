// Camera frames to the network's input and back: what an inference engine does not do.
//
// A frame is uint8, rows `pitch` bytes apart, one byte a pixel (grey) or three (RGB or BGR), at an address of its own. The
// table of frames lies in device memory, so that a captured CUDA graph serves new frames without being captured again.
// Every kernel has a numpy twin of the same name in defense_vae_fast/frames.py, which is its specification.

#include <cuda_fp16.h>

// As defense_vae_fast.frames packs it: 24 bytes.
struct Frame {
  unsigned long long address;
  int height;
  int width;
  int pitch;
  int order;
};

enum Order { kGrey = 0, kRGB = 1, kBGR = 2 };
enum Filter { kBilinear = 0, kArea = 1 };

namespace {

// ITU-R BT.601, as PIL and OpenCV weigh colours.
__device__ __forceinline__ float luma(float red, float green, float blue) {
  return 0.299f * red + 0.587f * green + 0.114f * blue;
}

// One channel of a frame, 0..255, in the network's channels: one (grey) or three (RGB).
struct FramePlane {
  const unsigned char* pixels;
  int pitch;
  int order;
  int channels;
  int channel;

  __device__ __forceinline__ float operator()(int row, int column) const {
    const unsigned char* line = pixels + static_cast<size_t>(row) * pitch;
    if (order == kGrey) return line[column];
    const unsigned char* pixel = line + 3 * column;
    const int red = order == kRGB ? 0 : 2;
    if (channels == 1) return luma(pixel[red], pixel[1], pixel[2 - red]);
    return pixel[channel == 1 ? 1 : (channel == 0 ? red : 2 - red)];
  }
};

// One channel of a purified image, [0, 1].
struct ImagePlane {
  const __half* values;
  int size;

  __device__ __forceinline__ float operator()(int row, int column) const {
    return __half2float(values[row * size + column]);
  }
};

// Where output pixel `index` of `target` lies among `source` pixels: the two neighbours and the share of the second.
// Half-pixel centres, edges repeated.
struct Linear {
  int first;
  int second;
  float share;

  __device__ __forceinline__ Linear(int index, int source, int target) {
    float centre = (index + 0.5f) * (static_cast<float>(source) / target) - 0.5f;
    centre = fminf(fmaxf(centre, 0.0f), source - 1.0f);
    first = static_cast<int>(centre);
    second = min(first + 1, source - 1);
    share = centre - first;
  }
};

template <typename Plane>
__device__ float bilinear(const Plane& plane, int row, int column, int height, int width, int rows, int columns) {
  const Linear y(row, height, rows), x(column, width, columns);
  const float top = (1.0f - x.share) * plane(y.first, x.first) + x.share * plane(y.first, x.second);
  const float bottom = (1.0f - x.share) * plane(y.second, x.first) + x.share * plane(y.second, x.second);
  return (1.0f - y.share) * top + y.share * bottom;
}

// Mean over the source area that an output pixel covers; pixels at its border count by the part that is inside.
template <typename Plane>
__device__ float area(const Plane& plane, int row, int column, int height, int width, int rows, int columns) {
  const float top = row * (static_cast<float>(height) / rows), bottom = (row + 1) * (static_cast<float>(height) / rows);
  const float left = column * (static_cast<float>(width) / columns);
  const float right = (column + 1) * (static_cast<float>(width) / columns);
  float sum = 0.0f, weight = 0.0f;
  for (int y = static_cast<int>(top); y < height && y < bottom; ++y) {
    const float high = fminf(y + 1.0f, bottom) - fmaxf(static_cast<float>(y), top);
    for (int x = static_cast<int>(left); x < width && x < right; ++x) {
      const float covered = high * (fminf(x + 1.0f, right) - fmaxf(static_cast<float>(x), left));
      sum += covered * plane(y, x);
      weight += covered;
    }
  }
  return sum / weight;
}

template <typename Plane>
__device__ __forceinline__ float sample(const Plane& plane, int filter, int row, int column, int height, int width,
                                        int rows, int columns) {
  if (height == rows && width == columns) return plane(row, column);
  return filter == kArea ? area(plane, row, column, height, width, rows, columns)
                         : bilinear(plane, row, column, height, width, rows, columns);
}

}  // namespace

// frames[blockIdx.y] -> batch (N, channels, size, size) in [0, 1]. Threads stride over the pixels of an image.
extern "C" __global__ void __launch_bounds__(256)
    gather_frames(const Frame* __restrict__ frames, __half* __restrict__ batch, int channels, int size, int filter) {
  const Frame frame = frames[blockIdx.y];
  __half* image = batch + static_cast<size_t>(blockIdx.y) * channels * size * size;
  for (int pixel = blockIdx.x * blockDim.x + threadIdx.x; pixel < size * size; pixel += gridDim.x * blockDim.x) {
    for (int channel = 0; channel < channels; ++channel) {
      const FramePlane plane{reinterpret_cast<const unsigned char*>(frame.address), frame.pitch, frame.order, channels,
                             channel};
      // A row of zeros in the table pads a batch that is not full.
      const float value = frame.height == 0 ? 0.0f
                                            : sample(plane, filter, pixel / size, pixel % size, frame.height,
                                                     frame.width, size, size);
      image[channel * size * size + pixel] = __float2half_rn(value * (1.0f / 255.0f));
    }
  }
}

// purified (N, channels, size, size) in [0, 1] -> frames[blockIdx.y], resized to the frame and rounded to nearest.
extern "C" __global__ void __launch_bounds__(256)
    scatter_frames(const Frame* __restrict__ frames, const __half* __restrict__ purified, int channels, int size,
                   int filter) {
  const Frame frame = frames[blockIdx.y];
  const __half* image = purified + static_cast<size_t>(blockIdx.y) * channels * size * size;
  const int pixels = frame.height * frame.width;
  for (int pixel = blockIdx.x * blockDim.x + threadIdx.x; pixel < pixels; pixel += gridDim.x * blockDim.x) {
    const int row = pixel / frame.width, column = pixel % frame.width;
    float value[3];
    for (int channel = 0; channel < 3; ++channel) {
      const ImagePlane plane{image + (channels == 1 ? 0 : channel) * size * size, size};
      value[channel] = channel < channels
                           ? 255.0f * sample(plane, filter, row, column, size, size, frame.height, frame.width)
                           : value[0];
    }
    unsigned char* line = reinterpret_cast<unsigned char*>(frame.address) + static_cast<size_t>(row) * frame.pitch;
    if (frame.order == kGrey) {
      line[column] = static_cast<unsigned char>(
          rintf(channels == 1 ? value[0] : luma(value[0], value[1], value[2])));
    } else {
      const int red = frame.order == kRGB ? 0 : 2;
      line[3 * column + red] = static_cast<unsigned char>(rintf(value[0]));
      line[3 * column + 1] = static_cast<unsigned char>(rintf(value[1]));
      line[3 * column + 2 - red] = static_cast<unsigned char>(rintf(value[2]));
    }
  }
}

// scores[blockIdx.x] = mean |images - purified| over the `values` numbers of an image, summed in float32.
extern "C" __global__ void __launch_bounds__(256)
    reconstruction_error(const __half* __restrict__ images, const __half* __restrict__ purified,
                         float* __restrict__ scores, int values) {
  __shared__ float sums[256];
  const size_t start = static_cast<size_t>(blockIdx.x) * values;
  float sum = 0.0f;
  for (int index = threadIdx.x; index < values; index += blockDim.x) {
    sum += fabsf(__half2float(images[start + index]) - __half2float(purified[start + index]));
  }
  sums[threadIdx.x] = sum;
  // A tree of fixed shape: the same sum, bit for bit, on every run.
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) scores[blockIdx.x] = sums[0] / values;
}

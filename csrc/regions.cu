// Boxes of a camera's frame to a batch of small images and back, and a frame from overlapping tiles.
//
// A frame is uint8, rows `pitch` bytes apart, pixels of one to four bytes without a gap. What is meant is said by the NumPy
// functions of the same names in defense_vae_fast/regions.py; an axis is resized by itself, as regions.resize_reference does.

// As defense_vae_fast.regions_on_gpu sends it: whole pixels, the last two exclusive.
struct Box {
  int left;
  int top;
  int right;
  int bottom;
};

enum Method { kArea = 0, kBilinear = 1 };

namespace {

constexpr int kMaxChannels = 4;

// Along one axis, the old pixels that make a new one, and how much each counts. Places are whole numbers of parts of a pixel
// until the end, so that nothing is lost in a large frame.
struct Taps {
  int first;
  int last;
  float front;  // share of the first pixel
  float back;   // share of the last
  float inner;  // of those between
};

__device__ __forceinline__ Taps taps(int index, int before, int after, int method) {
  Taps made;
  if (method == kArea && after < before) {
    // The mean over [index, index + 1) * before / after.
    const long long start = static_cast<long long>(index) * before, end = start + before;
    made.first = static_cast<int>(start / after);
    made.last = static_cast<int>((end - 1) / after);
    made.inner = static_cast<float>(after) / before;
    made.front = static_cast<float>(after - start % after) / before;
    made.back = static_cast<float>(end - static_cast<long long>(made.last) * after) / before;
    return made;
  }
  // Between the centres of two pixels, the border repeated: (index + 1/2) * before / after - 1/2.
  const long long parts = 2LL * after;
  long long centre = (2LL * index + 1) * before - after;
  centre = centre < 0 ? 0 : centre;
  made.first = static_cast<int>(centre / parts);
  made.back = static_cast<float>(centre % parts) / parts;
  if (made.first >= before - 1) {
    made.first = before - 1;
    made.back = 0.0f;
  }
  made.last = min(made.first + 1, before - 1);
  made.front = 1.0f - made.back;
  made.inner = 0.0f;
  return made;
}

__device__ __forceinline__ float share(const Taps& taps, int place) {
  return place == taps.first ? taps.front : place == taps.last ? taps.back : taps.inner;
}

// One pixel of an image of `height` x `width` resized to `rows` x `columns`, written to `result`.
__device__ __forceinline__ void resized(const unsigned char* image, size_t pitch, int channels, int height, int width, int row,
                                        int column, int rows, int columns, int method, unsigned char* result) {
  const Taps down = taps(row, height, rows, method), across = taps(column, width, columns, method);
  float sums[kMaxChannels] = {};
  for (int y = down.first; y <= down.last; ++y) {
    const unsigned char* line = image + y * pitch;
    float line_sums[kMaxChannels] = {};
    for (int x = across.first; x <= across.last; ++x) {
      const float weight = share(across, x);
#pragma unroll
      for (int channel = 0; channel < kMaxChannels; ++channel) {
        if (channel < channels) line_sums[channel] += weight * line[static_cast<size_t>(x) * channels + channel];
      }
    }
    const float weight = share(down, y);
#pragma unroll
    for (int channel = 0; channel < kMaxChannels; ++channel) sums[channel] += weight * line_sums[channel];
  }
#pragma unroll
  for (int channel = 0; channel < kMaxChannels; ++channel) {
    if (channel < channels) result[channel] = static_cast<unsigned char>(fminf(rintf(sums[channel]), 255.0f));
  }
}

// Along one axis: tiles of `side` pixels, the next one `step` further, the last one flush with the end.
struct Tiling {
  int length;
  int side;
  int step;
  int count;

  __device__ __forceinline__ Tiling(int length, int side, int overlap)
      : length(length), side(side), step(side - overlap), count((length - side + step - 1) / step + 1) {}

  __device__ __forceinline__ int start(int tile) const { return tile < count - 1 ? tile * step : length - side; }

  // The first tile that a pixel lies in; those after it that begin before the pixel follow.
  __device__ __forceinline__ int first(int pixel) const { return pixel < side ? 0 : (pixel - side) / step + 1; }

  // Rises over the overlap, is 1 in the middle, and falls again.
  __device__ __forceinline__ float ramp(int place) const {
    const int overlap = side - step, nearest = min(place, side - 1 - place) + 1;
    return __fdiv_rn(static_cast<float>(min(nearest, overlap + 1)), static_cast<float>(overlap + 1));
  }

  __device__ __forceinline__ float coverage(int pixel) const {
    float total = 0.0f;
    for (int tile = first(pixel); tile < count && start(tile) <= pixel; ++tile) {
      total = __fadd_rn(total, ramp(pixel - start(tile)));
    }
    return total;
  }
};

}  // namespace

// boxes[blockIdx.y] of the frame -> images (N, height, width, channels). Threads stride over the pixels of an image.
extern "C" __global__ void __launch_bounds__(256)
    crop_boxes(const unsigned char* __restrict__ frame, int pitch, int channels, const Box* __restrict__ boxes,
               unsigned char* __restrict__ images, int height, int width, int method) {
  const Box box = boxes[blockIdx.y];
  const int pixels = height * width;
  const unsigned char* corner = frame + static_cast<size_t>(box.top) * pitch + static_cast<size_t>(box.left) * channels;
  unsigned char* image = images + static_cast<size_t>(blockIdx.y) * pixels * channels;
  for (int pixel = blockIdx.x * blockDim.x + threadIdx.x; pixel < pixels; pixel += gridDim.x * blockDim.x) {
    resized(corner, pitch, channels, box.bottom - box.top, box.right - box.left, pixel / width, pixel % width, height, width,
            method, image + static_cast<size_t>(pixel) * channels);
  }
}

// The frame with images (N, side, side, channels) resized into their boxes, later ones over earlier ones -> result (height,
// width, channels). A block makes a part of row blockIdx.y.
extern "C" __global__ void __launch_bounds__(256)
    paste_boxes(const unsigned char* __restrict__ frame, int pitch, int channels, const Box* __restrict__ boxes, int count,
                const unsigned char* __restrict__ images, int side, unsigned char* __restrict__ result, int width,
                int method) {
  const int row = blockIdx.y;
  for (int column = blockIdx.x * blockDim.x + threadIdx.x; column < width; column += gridDim.x * blockDim.x) {
    unsigned char* pixel = result + (static_cast<size_t>(row) * width + column) * channels;
    int last = count - 1;
    while (last >= 0 && !(boxes[last].left <= column && column < boxes[last].right && boxes[last].top <= row &&
                          row < boxes[last].bottom)) {
      --last;
    }
    if (last < 0) {
      const unsigned char* source = frame + static_cast<size_t>(row) * pitch + static_cast<size_t>(column) * channels;
      for (int channel = 0; channel < channels; ++channel) pixel[channel] = source[channel];
      continue;
    }
    const Box box = boxes[last];
    const size_t bytes = static_cast<size_t>(side) * channels;
    resized(images + last * side * bytes, bytes, channels, side, side, row - box.top, column - box.left, box.bottom - box.top,
            box.right - box.left, method, pixel);
  }
}

// tiles (rows * columns, side, side, channels) -> result (height, width, channels): means weighted by the tiles' ramps. Sums are
// made in the order and with the roundings of NumPy's float32, so that the result is the same to the bit.
extern "C" __global__ void __launch_bounds__(256)
    blend_tiles(const unsigned char* __restrict__ tiles, int side, int overlap, int channels,
                unsigned char* __restrict__ result, int height, int width) {
  const int row = blockIdx.y;
  const Tiling down(height, side, overlap), across(width, side, overlap);
  for (int column = blockIdx.x * blockDim.x + threadIdx.x; column < width; column += gridDim.x * blockDim.x) {
    float sums[kMaxChannels] = {};
    for (int high = down.first(row); high < down.count && down.start(high) <= row; ++high) {
      const int y = row - down.start(high);
      for (int left = across.first(column); left < across.count && across.start(left) <= column; ++left) {
        const int x = column - across.start(left);
        const float weight = __fmul_rn(down.ramp(y), across.ramp(x));
        const size_t tile = static_cast<size_t>(high) * across.count + left;
        const unsigned char* pixel = tiles + ((tile * side + y) * side + x) * channels;
#pragma unroll
        for (int channel = 0; channel < kMaxChannels; ++channel) {
          if (channel < channels) sums[channel] = __fadd_rn(sums[channel], __fmul_rn(weight, pixel[channel]));
        }
      }
    }
    const float total = __fmul_rn(down.coverage(row), across.coverage(column));
    unsigned char* pixel = result + (static_cast<size_t>(row) * width + column) * channels;
#pragma unroll
    for (int channel = 0; channel < kMaxChannels; ++channel) {
      if (channel < channels) pixel[channel] = static_cast<unsigned char>(rintf(__fdiv_rn(sums[channel], total)));
    }
  }
}

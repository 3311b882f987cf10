// The kernels of csrc/frames.cu behind plain C functions, for ctypes.
#include FRAMES_CU

extern "C" void run_gather_frames(unsigned count, unsigned blocks, const Frame* frames, __half* batch, int channels, int size,
                                  int filter) {
  launch(blocks, count, 256, false, [=] { gather_frames(frames, batch, channels, size, filter); });
}

extern "C" void run_scatter_frames(unsigned count, unsigned blocks, const Frame* frames, const __half* purified, int channels,
                                   int size, int filter) {
  launch(blocks, count, 256, false, [=] { scatter_frames(frames, purified, channels, size, filter); });
}

extern "C" void run_reconstruction_error(unsigned count, const __half* images, const __half* purified, float* scores,
                                         int values) {
  launch(count, 1, 256, true, [=] { reconstruction_error(images, purified, scores, values); });
}

extern "C" int frame_bytes() { return sizeof(Frame); }

// The kernels of csrc/regions.cu behind plain C functions, for ctypes.
#include "cuda_fp16.h"
//
#include REGIONS_CU

extern "C" void run_crop_boxes(unsigned x, unsigned y, const unsigned char* frame, int pitch, int channels, const Box* boxes,
                               unsigned char* images, int height, int width, int method) {
  launch(x, y, 256, false, [=] { crop_boxes(frame, pitch, channels, boxes, images, height, width, method); });
}

extern "C" void run_paste_boxes(unsigned x, unsigned y, const unsigned char* frame, int pitch, int channels, const Box* boxes,
                                int count, const unsigned char* images, int side, unsigned char* result, int width,
                                int method) {
  launch(x, y, 256, false,
         [=] { paste_boxes(frame, pitch, channels, boxes, count, images, side, result, width, method); });
}

extern "C" void run_blend_tiles(unsigned x, unsigned y, const unsigned char* tiles, int side, int overlap, int channels,
                                unsigned char* result, int height, int width) {
  launch(x, y, 256, false, [=] { blend_tiles(tiles, side, overlap, channels, result, height, width); });
}

extern "C" int box_bytes() { return sizeof(Box); }

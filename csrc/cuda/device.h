// What a plan has to know of the device.

#pragma once

namespace afm::cuda {

// Read once a device: the driver is slow to say it.
int multiprocessors(int device);

}  // namespace afm::cuda

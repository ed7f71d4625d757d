#pragma once

// Programmatic dependent launch: a kernel may be set up while the one before it in the stream still runs.
namespace tilewright::ptx {

// Lets the next kernel be set up as soon as there is room for it.
__device__ __forceinline__ void launch_dependent_grids() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Waits until the kernel before has ended and all it wrote is visible.
__device__ __forceinline__ void wait_for_prerequisite_grids() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace tilewright::ptx

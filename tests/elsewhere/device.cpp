// A device for tests whose memory is the CPU's. Like a true one it is a place of its own to torch: it has an
// allocator, a current device and a queue, all that torch.accelerator asks for, and an operation that is given
// tensors here and tensors on the CPU is an error. What an operation computes, the CPU computes for it.

#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace {

using at::Tensor;
using c10::DeviceType;

constexpr auto DEVICE = DeviceType::PrivateUse1;

std::atomic<int64_t> held{0}, most_held{0};

struct Memory final : c10::DeviceAllocator {
    c10::DataPtr allocate(size_t size) override {
        auto *block = static_cast<size_t *>(std::aligned_alloc(64, 64 + (size + 63) / 64 * 64));
        TORCH_CHECK(block != nullptr, "no memory for ", size, " bytes");
        *block = size;
        int64_t now = held += static_cast<int64_t>(size), most = most_held;
        while (now > most && !most_held.compare_exchange_weak(most, now)) {
        }
        return {block + 8, block + 8, &free_block, c10::Device(DEVICE, 0)};
    }

    c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
    void copy_data(void *to, const void *from, size_t size) const override { std::memcpy(to, from, size); }
    bool initialized() override { return true; }
    void emptyCache(c10::MempoolId_t) override {}
    void recordStream(const c10::DataPtr &, c10::Stream) override {}
    void resetAccumulatedStats(c10::DeviceIndex) override {}
    void resetPeakStats(c10::DeviceIndex) override { most_held = held.load(); }

    c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
        c10::CachingDeviceAllocator::DeviceStats stats;
        for (auto *bytes : {&stats.allocated_bytes, &stats.reserved_bytes}) {
            (*bytes)[0].current = held;
            (*bytes)[0].peak = most_held;
        }
        return stats;
    }

    static void free_block(void *data) {
        auto *block = static_cast<size_t *>(data) - 8;
        held -= static_cast<int64_t>(*block);
        std::free(block);
    }
};

Memory memory;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DEVICE> {
    // There is one device, 0, with one queue.
    c10::Device exchangeDevice(c10::Device) const override { return {DEVICE, 0}; }
    c10::Device getDevice() const override { return {DEVICE, 0}; }
    c10::Stream getStream(c10::Device) const noexcept override { return queue(); }
    c10::Stream exchangeStream(c10::Stream) const noexcept override { return queue(); }
    static c10::Stream queue() { return c10::Stream(c10::Stream::DEFAULT, c10::Device(DEVICE, 0)); }
    void synchronizeDevice(const c10::DeviceIndex) const override {}

    // All is done in the order in which it is asked for: there is nothing that an event would have to wait for.
    void record(void **, const c10::Stream &, const c10::DeviceIndex, const c10::EventFlag) const override {}
    void block(void *, const c10::Stream &) const override {}
    bool queryEvent(void *) const override { return true; }
};

struct Hooks final : at::PrivateUse1HooksInterface {
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    c10::DeviceIndex deviceCount() const override { return 1; }
    c10::DeviceIndex getCurrentDevice() const override { return 0; }
    void setCurrentDevice(c10::DeviceIndex) const override {}
    c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
    c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
    at::Allocator *getPinnedMemoryAllocator() const override { return c10::GetAllocator(DeviceType::CPU); }
};

c10::ScalarType own_dtype(std::optional<c10::ScalarType> dtype) {
    return dtype.value_or(c10::typeMetaToScalarType(c10::get_default_dtype()));
}

Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
             std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
    return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                     own_dtype(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                     std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
    return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                             own_dtype(dtype));
}

// The same memory as a tensor of the CPU.
Tensor on_cpu(const Tensor &x) {
    if (!x.is_privateuseone())
        return x;
    auto shared = at::from_blob(x.data_ptr(), x.sizes(), x.strides(), x.options().device(DeviceType::CPU));
    return x.is_conj() ? shared.conj() : shared;
}

Tensor copy_from(const Tensor &from, const Tensor &to, bool) {
    on_cpu(to).copy_(on_cpu(from));
    return to;
}

const Tensor &grow(const Tensor &x, c10::IntArrayRef size, std::optional<c10::MemoryFormat>) {
    auto *own = x.unsafeGetTensorImpl();
    if (own->sizes() == size)  // a view stays one
        return x;
    own->set_sizes_contiguous(size);
    auto needed = (own->storage_offset() + own->numel()) * own->itemsize();
    if (needed > own->storage().nbytes()) {
        auto grown = memory.allocate(needed);
        std::memcpy(grown.get(), own->storage().data(), own->storage().nbytes());
        own->unsafe_storage().set_data_ptr_noswap(std::move(grown));
        own->unsafe_storage().set_nbytes(needed);
    }
    return x;
}

Tensor copy_from_and_resize(const Tensor &from, const Tensor &to) {
    grow(to, from.sizes(), std::nullopt);
    return copy_from(from, to, false);
}

c10::Scalar number_of(const Tensor &x) { return on_cpu(x).item(); }

void check_device(const c10::OperatorHandle &op, const Tensor &x) {
    TORCH_CHECK(!x.defined() || x.is_privateuseone() || x.dim() == 0, op.schema().name(),
                ": expected all tensors on one device, got one on ", x.device(), " beside others");
}

// Compute on the CPU what has no kernel of its own, which is nearly everything.
void compute(const c10::OperatorHandle &op, torch::jit::Stack *stack) {
    for (const auto &given : torch::jit::last(*stack, op.schema().arguments().size())) {
        if (given.isTensor())
            check_device(op, given.toTensor());
        else if (given.isTensorList())
            for (const Tensor &x : given.toTensorVector())
                check_device(op, x);
    }
    at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
    library.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
    library.impl("empty.memory_format", empty);
    library.impl("empty_strided", empty_strided);
    library.impl("as_strided", at::native::as_strided_tensorimpl);
    library.impl("view", at::native::view);
    library.impl("unfold", at::native::unfold);
    library.impl("_reshape_alias", at::native::_reshape_alias);
    library.impl("resize_", grow);
    library.impl("_copy_from", copy_from);
    library.impl("_copy_from_and_resize", copy_from_and_resize);
    library.impl("_local_scalar_dense", number_of);
}

struct Registration {
    Registration() {
        c10::SetAllocator(DEVICE, &memory);
        at::RegisterPrivateUse1HooksInterface(new Hooks());
    }
} registration;

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

}  // namespace

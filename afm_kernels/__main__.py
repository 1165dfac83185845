"""``python -m afm_kernels``: what is installed, and which backend serves each operator on each device."""

from __future__ import annotations

from pathlib import Path

from afm_kernels.ops import DEVICES, backend_info


def main() -> None:
    info = backend_info()
    for name, version in info["versions"].items():
        print(f"{name:<12} {version or '-'}")
    print(f"\n{'folder':<12} {Path(__file__).parent}")
    for backend, status in info["backends"].items():
        print(f"{backend:<12} {status}")
    if info["cpu_capability"]:
        print(f"{'':<12} CPU instruction set: {info['cpu_capability']}")
    serves: dict[str, dict[str, str | None]] = {}
    for key, backend in info["serves"].items():
        op, device = key.split("/")
        serves.setdefault(op, {})[device] = backend
    width = max(map(len, serves))
    print(f"\n{'operator':<{width}}  " + "  ".join(f"{device:<9}" for device in DEVICES).rstrip())
    for op, by_device in serves.items():
        print(f"{op:<{width}}  " + "  ".join(f"{by_device.get(d) or '-':<9}" for d in DEVICES).rstrip())


if __name__ == "__main__":
    main()

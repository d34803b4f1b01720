# SPDX-License-Identifier: Apache-2.0
"""The grammar of device lists: NVIDIA's plain names, CDI names (vendor/class=device), and annotations that hold them.

What names a device of NVIDIA's is understood or refused with a RequestError. It is never passed over: the next source
of a request is often the image, and that may ask for more (`NVIDIA_VISIBLE_DEVICES=all`). Devices of other vendors are
the engine's business.

Annotations are read under the prefixes of config.toml. Who writes which:
    cdi.k8s.io/           the kubelet and k8s-device-plugin; containerd and CRI-O resolve these themselves
    nvidia.cdi.k8s.io/    the GPU Operator's device plugin, for NVIDIA's runtime alone; and for its NRI plugin
                          `nvidia.cdi.k8s.io/container.NAME`, which all containers of a pod may have
"""

from __future__ import annotations

from nvhook.errors import RequestError

# The second is the kind of NVIDIA's runtime, the third that of k8s-device-plugin.
_GPU_KINDS = ("nvidia.com/gpu", "runtime.nvidia.com/gpu", "k8s.device-plugin.nvidia.com/gpu")
_MIG_KIND = "nvidia.com/mig"
_MANAGEMENT_KIND = "management.nvidia.com/gpu"  # every GPU, for containers that look after the host's GPUs
_CDI_DOMAIN = "cdi.k8s.io"
_REMEDY = "name GPUs as nvidia.com/gpu=<index or UUID>, or leave it out"
_MAX_QUOTED = 200  # characters of a value in a message

# Marks of the engines that pass on what an image or a checkpoint brought, or did so in versions that are in use:
#   Podman      the annotations of an image's manifest, and at a restore those of the checkpoint
#   nerdctl     every label as an annotation, in older versions, and an image has labels
#   containerd  (CRI) the annotations in a checkpoint image, before 2.1.9, 2.2.5 and 2.3.2: CVE-2026-53492
#   CRI-O       likewise restores containers from images
# They set their marks themselves, so no image can take one away. What has no mark comes from Docker or ctr, which write
# only the annotations of their command line, or from whoever wrote config.json.
_MARKS = ("io.kubernetes.cri.", "io.kubernetes.cri-o.", "io.podman.annotations.", "nerdctl/")
_MANAGERS = ("libpod", "cri-o")
_NAME_MARKS = ("io.kubernetes.cri.container-name", "io.kubernetes.container.name")  # containerd's, CRI-O's


def passes_on(annotations: dict[str, str]) -> bool:
    """Whether the engine that wrote them may pass on those of an image or of a checkpoint."""
    if annotations.get("io.container.manager") in _MANAGERS:
        return True
    return any(key.startswith(_MARKS) for key in annotations)


def annotated(annotations: dict[str, str], prefixes: tuple[str, ...]) -> dict[str, list[str]]:
    """Key -> names, in the order of the keys: what the lists name, other vendors' devices left out.

    A key that has nothing left is not there. One of CDI's that `prefixes` does not cover is, and its list is refused.
    """
    found = {}
    own = _own_names(annotations)
    for key in sorted(annotations):
        if is_key(key, prefixes) and not _is_of_another_container(key, own):
            names = [name for name in _items(annotations[key]) if not _is_of_another_vendor(name)]
            if names:
                found[key] = names
    return found


def is_key(key: str, prefixes: tuple[str, ...]) -> bool:
    domain = key.partition("/")[0].lower()
    return is_read(key, prefixes) or domain == _CDI_DOMAIN or domain.endswith(f".{_CDI_DOMAIN}")


def is_read(key: str, prefixes: tuple[str, ...]) -> bool:
    return f"{key}/".startswith(prefixes)  # `nvidia.cdi.k8s.io` alone is a key as well, of the NRI plugin's


def unread(key: str, value: str, prefixes: tuple[str, ...]) -> RequestError:
    return RequestError(
        f"{quoted(key, value)} names devices under a key that is not read",
        f"`annotation-prefixes` in config.toml has {', '.join(prefixes) or 'none'}: add this one, or use one of them",
    )


def stray(annotations: dict[str, str], prefixes: tuple[str, ...]) -> str:
    """The first key that is none of CDI's and holds nothing but CDI names, one of them NVIDIA's; or empty."""
    for key in sorted(annotations):
        names = _items(annotations[key])
        if not is_key(key, prefixes) and all(map(_is_qualified, names)) and any(map(is_nvidia, names)):
            return key
    return ""


def quoted(key: str, value: str) -> str:
    return f"the annotation {_short(key)}={_short(value)}"


def is_nvidia(name: str) -> bool:
    """Whether it is a CDI name, or the beginning of one, with NVIDIA for its vendor."""
    vendor = name.partition("=")[0].partition("/")[0].lower()
    return vendor == "nvidia.com" or vendor.endswith(".nvidia.com")


def plain(name: str, place: str, *, privileged: bool, must_be_cdi: bool = False) -> str:
    """The GPU or MIG device as NVIDIA_VISIBLE_DEVICES names it: an index, a UUID, `all`, …

    RequestError, which names `place`, for a CDI name of NVIDIA's that is not understood. A name that is none of CDI's
    is left to selection.py, unless it `must_be_cdi`; and so is another vendor's, which is unknown there.
    """
    if must_be_cdi and not _is_qualified(name):
        raise RequestError(f"{_short(name)} in {place} is not a CDI name (vendor/class=device)", _REMEDY)
    if not is_nvidia(name):
        return name
    kind, _, device = name.partition("=")
    if not device:
        raise RequestError(f"{_short(name)} in {place} names no device", _REMEDY)
    if kind in _GPU_KINDS:
        return device
    if kind == _MIG_KIND:
        return _mig(name, device, place)
    if kind == _MANAGEMENT_KIND:
        return _management(name, device, place, privileged=privileged)
    known = ", ".join((*_GPU_KINDS, _MIG_KIND, _MANAGEMENT_KIND))
    raise RequestError(f"{_short(name)} in {place} is of an unknown kind {_short(kind)}", f"known are {known}")


def _mig(name: str, device: str, place: str) -> str:
    """One MIG device. `0` would be a whole GPU, and `all` every GPU with what is not divided: more than was asked."""
    if not is_mig(device):
        raise RequestError(f"{_short(name)} in {place} names no MIG device", "write its UUID, or <GPU>:<index>")
    return device


def _management(name: str, device: str, place: str, *, privileged: bool) -> str:
    if device != "all":
        raise RequestError(
            f"{_short(name)} in {place} is not a device of this kind", f"it has one: {_MANAGEMENT_KIND}=all"
        )
    if not privileged:
        raise RequestError(
            f"{_short(name)} in {place} is for privileged containers alone",
            "start it with CAP_SYS_ADMIN (`docker run --privileged`), or ask for nvidia.com/gpu=all",
        )
    return device


def _items(value: str) -> list[str]:
    """Once each, before each is read: a list can hold millions."""
    return [item for item in dict.fromkeys(map(str.strip, value.split(","))) if item]


def _is_qualified(name: str) -> bool:
    kind, _, device = name.partition("=")
    vendor, _, class_name = kind.partition("/")
    # CDI's characters, and the slashes in the names that MIG devices had before driver 470.
    return _is_made_of(vendor, "_.-") and _is_made_of(class_name, "_.-") and _is_made_of(device, "_.-:/")


def _is_made_of(text: str, punctuation: str) -> bool:
    """Letters and digits of ASCII, and between them `punctuation`: `nvidia.com.` is no vendor, and no other one."""
    letters = text.translate(dict.fromkeys(map(ord, punctuation)))
    return text.isascii() and letters.isalnum() and text[0].isalnum() and text[-1].isalnum()


def _is_of_another_vendor(name: str) -> bool:
    return _is_qualified(name) and not is_nvidia(name)


def _own_names(annotations: dict[str, str]) -> list[str | None] | None:
    """What a container of a pod is called there, none for the sandbox; None where there is no pod.

    Asked once for all keys: an image can have a hundred thousand annotations.
    """
    if not any(key.startswith("io.kubernetes.") for key in annotations):
        return None
    return [annotations.get(mark) for mark in _NAME_MARKS]


def _is_of_another_container(key: str, own: list[str | None] | None) -> bool:
    """`…/container.NAME` of a pod, in the config.json of its other containers and of its sandbox."""
    _, is_named, name = key.partition("/container.")
    return bool(is_named) and own is not None and name not in own


def _short(text: str) -> str:
    """In quotes, for a message; an annotation may hold a megabyte."""
    return f"`{text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED] + '…'}`"


def is_mig(device: str) -> bool:
    """Whether this is how a MIG device is named: MIG-<uuid>, MIG-<GPU's uuid>/<gi>/<ci>, or <gpu index>:<index>."""
    gpu, _, index = device.partition(":")
    return device.lower().startswith("mig-") or (small_number(gpu) >= 0 and small_number(index) >= 0)


def small_number(text: str) -> int:
    """-1 for what is no number; int() would also take signs, underscores and the digits of other scripts."""
    return int(text) if text.isdecimal() and text.isascii() and len(text) < 8 else -1

"""The wheel holds the extension, the Triton twins and the embedded model, and stays small."""

import sys
import zipfile

path = sys.argv[1]
names = zipfile.ZipFile(path).namelist()
wanted = ["text3d_fast/_C", "text3d_fast/_triton/", "text3d_fast/ops/", "text3d_fast/toybox/weights/"]
missing = [prefix for prefix in wanted if not any(name.startswith(prefix) for name in names)]
size = sum(info.compress_size for info in zipfile.ZipFile(path).infolist()) / 2**20
print(f"{path}: {len(names)} files, {size:.1f} MiB")
if missing:
    sys.exit(f"missing from the wheel: {', '.join(missing)}")

"""The wheel holds what the tree holds: every module, the Triton twins, the embedded model and the extension."""

import sys
import zipfile
from pathlib import Path

path = sys.argv[1]
names = {info.filename: info.compress_size for info in zipfile.ZipFile(path).infolist()}
wanted = {str(file) for file in Path("text3d_fast").rglob("*.py") if "_triton" not in file.parts}
wanted |= {f"text3d_fast/_triton/{file.name}" for file in Path("kernels/triton").glob("*.py")}
for data in ("text3d_fast/toybox/learned/weights", "text3d_fast/guidance/models/families"):
    wanted |= {str(file) for file in Path(data).rglob("*") if file.is_file() and file.suffix != ".pyc"}
wanted |= {"text3d_fast/py.typed"}
missing = sorted(wanted - set(names))
if not any(name.startswith("text3d_fast/_C") for name in names):
    missing.append("text3d_fast/_C")
extra = sorted(name for name in names if not name.startswith(("text3d_fast/", "text3d_fast-", "text3d_fast.")))
print(f"{path}: {len(names)} files, {sum(names.values()) / 2**20:.1f} MiB")
if missing or extra:
    sys.exit(f"missing from the wheel: {missing}; not of the package: {extra}")

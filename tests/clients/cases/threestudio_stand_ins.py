"""threestudio's own files without Lightning, igl and the models around them, which rendering does not use."""

import importlib.util
import sys
from types import ModuleType


def load(checkout: str, *names: str) -> list[ModuleType]:
    """threestudio.<name> from its file, inside a package that has nothing else but bases of the right names."""
    package = ModuleType("threestudio")
    package.register = lambda name: lambda cls: cls
    package.warn = print
    stand_ins = {
        "igl": ("fast_winding_number_for_meshes", "point_mesh_squared_distance", "read_obj"),
        "typeguard": ("typechecked",),
        "threestudio.models.background.base": ("BaseBackground",),
        "threestudio.models.geometry.base": ("BaseImplicitGeometry",),
        "threestudio.models.materials.base": ("BaseMaterial",),
        "threestudio.models.networks": ("create_network_with_input_encoding",),
        "threestudio.systems.utils": ("parse_optimizer", "parse_scheduler_to_instance"),
        "threestudio.utils.config": ("parse_structured", "config_to_primitive"),
        "threestudio.utils.misc": ("get_device", "load_module_weights"),
    }
    sys.modules["threestudio"] = package
    for name in ("models", "models.renderers", "utils"):
        sys.modules[f"threestudio.{name}"] = ModuleType(f"threestudio.{name}")
        sys.modules[f"threestudio.{name}"].__path__ = [f"{checkout}/threestudio/{name.replace('.', '/')}"]
    for name, contents in stand_ins.items():
        if name.startswith("threestudio") or importlib.util.find_spec(name) is None:
            sys.modules[name] = ModuleType(name)
            for content in contents:
                setattr(sys.modules[name], content, type(content, (), {}))
    sys.modules["threestudio.utils.misc"].get_device = lambda: "cuda"
    sys.modules["threestudio.utils.config"].parse_structured = lambda cls, cfg: cls(**(cfg or {}))
    return [importlib.import_module(f"threestudio.{name}") for name in names]

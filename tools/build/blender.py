"""Check of an export in Blender: `python tools/build/blender.py outputs/NAME.npz`, where `bpy` is installed.

Run `hmdiff export outputs/NAME.npz` first. Both exported files are imported. For each clip of the GLB, Blender's
armature modifier poses the last frame, and the skin is compared with the hypothesis mesh in the npz. They differ only
by the shape that all clips share (the millimetres that `hmdiff export` prints).
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(arguments: list[str]) -> None:
    bpy: Any = importlib.import_module("bpy")  # not a dependency: 350 MB, one Python version per release
    result = Path(arguments[0])
    with np.load(result) as arrays:
        vertices, translation = arrays["vertices"], arrays["translation"]
    print(f"bpy {bpy.app.version_string}")
    bpy.ops.wm.read_factory_settings(use_empty=True)
    bpy.ops.import_scene.gltf(filepath=str(result.with_name(f"{result.stem}_animated.glb")))
    body, rig = bpy.data.objects["body"], bpy.data.objects["Armature"]
    distances = []
    for number, mesh in enumerate(vertices):
        action = bpy.data.actions[f"hypothesis_{number:02d}"]
        rig.animation_data.action = action
        if action.slots:
            rig.animation_data.action_slot = action.slots[0]
        bpy.context.scene.frame_set(round(action.frame_range[1]))
        posed = body.evaluated_get(bpy.context.evaluated_depsgraph_get())
        found = np.array([posed.matrix_world @ vertex.co for vertex in posed.data.vertices])
        x, y, z = (mesh + np.broadcast_to(translation, (len(vertices), 3))[number]).T
        distances.append(np.linalg.norm(found - np.stack([x, z, -y], 1), axis=1).mean())  # Blender is z up
    print(
        f"GLB: {len(rig.data.bones)} bones, {len(body.data.vertices)} vertices, {len(body.vertex_groups)} groups, "
        f"{len(bpy.data.actions)} actions; last frames {1000 * np.mean(distances):.1f} mm from the npz's meshes"
    )
    bpy.ops.wm.read_factory_settings(use_empty=True)
    bpy.ops.import_anim.bvh(filepath=str(result.with_name(f"{result.stem}.bvh")), global_scale=0.01)
    rig = next(each for each in bpy.data.objects if each.type == "ARMATURE")
    print(
        f"BVH: {len(rig.data.bones)} bones, frames {[round(end) for end in bpy.data.actions[0].frame_range]}, "
        f"{max(rig.dimensions):.2f} m"
    )


if __name__ == "__main__":
    main(sys.argv[1:])

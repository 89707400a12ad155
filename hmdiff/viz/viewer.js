// The page of one person's result: bodies over the photo, in the photo camera's view or a free view.
// Written by hmdiff/viz/viewer.py beside every result. THREE (three.js, MIT) is inlined before this script.
// Frame of the data: OpenCV's camera (x right, y down, z forward), metres; `world` converts to three.js's (y up, z back).
"use strict";

const person = JSON.parse(document.getElementById("person").textContent);
const find = id => document.getElementById(id);
const DTYPES = {int16: Int16Array, uint16: Uint16Array, uint32: Uint32Array, uint8: Uint8Array};

async function unpack({dtype, data}) {  // inverse of `_packed` in viewer.py: inflate; the low bytes of all numbers come first
  const deflated = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
  const planes = new Uint8Array(await new Response(new Blob([deflated]).stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer());
  const width = DTYPES[dtype].BYTES_PER_ELEMENT, count = planes.length / width, bytes = new Uint8Array(planes.length);
  for (let plane = 0; plane < width; plane++)
    for (let i = 0; i < count; i++) bytes[i * width + plane] = planes[plane * count + i];
  return new DTYPES[dtype](bytes.buffer);
}

async function start() {
  const data = {};
  for (const name of Object.keys(person.arrays)) data[name] = await unpack(person.arrays[name]);
  const count = person.translation.length;  // N + 1 bodies: the mean, then the hypotheses
  const size = data.mean.length;

  // ---- the scene -------------------------------------------------------------------------------------------------
  const renderer = new THREE.WebGLRenderer({antialias: true, preserveDrawingBuffer: true});
  renderer.outputEncoding = THREE.sRGBEncoding;
  document.body.prepend(renderer.domElement);
  const scene = new THREE.Scene();
  scene.background = new THREE.Color(0xf2f3f6);
  const world = new THREE.Group();
  world.rotation.x = Math.PI;
  scene.add(world);
  const camera = new THREE.PerspectiveCamera(40, 1, 0.05, 200);
  const sun = new THREE.DirectionalLight(0xffffff, 0.75);
  scene.add(new THREE.HemisphereLight(0xffffff, 0x8a8f99, 0.55), sun, sun.target);
  const controls = new THREE.TrackballControls(camera, renderer.domElement);
  Object.assign(controls, {rotateSpeed: 2.5, staticMoving: true, keys: ["", "", ""]});

  const pelvis = new THREE.Vector3(...person.translation[0]).applyAxisAngle(new THREE.Vector3(1, 0, 0), Math.PI);
  const [width, height] = person.crop.size, [cx, cy] = person.crop.principal_point, focal = person.crop.focal;

  // The photo's crop on a plane behind the bodies, so that each pixel lies on its camera ray.
  const far = -pelvis.z + 1.6;
  const picture = new THREE.TextureLoader().load(person.photo, () => { ready.photo = true; draw(); });
  picture.encoding = THREE.sRGBEncoding;
  const backdrop = new THREE.Mesh(
    new THREE.PlaneGeometry(width / focal * far, height / focal * far),
    new THREE.MeshBasicMaterial({map: picture, side: THREE.DoubleSide}));
  backdrop.position.set((width / 2 - cx) / focal * far, -(height / 2 - cy) / focal * far, -far);
  scene.add(backdrop);

  // ---- bodies: one topology, positions computed when a body is first shown --------------------------------------------
  const index = new THREE.BufferAttribute(data.faces, 1);
  const bodies = Array.from({length: count}, () => null);
  const shown = new Set();

  function position(number) {  // metres; hypotheses are stored as differences from the mean
    const points = new Float32Array(size);
    const offset = (number - 1) * size;
    for (let i = 0; i < size; i++) points[i] = (data.mean[i] + (number ? data.delta[offset + i] : 0)) * person.unit;
    return points;
  }

  function body(number) {
    if (bodies[number]) return bodies[number];
    const geometry = new THREE.BufferGeometry();
    geometry.setAttribute("position", new THREE.BufferAttribute(position(number), 3));
    geometry.setIndex(index);
    geometry.computeVertexNormals();
    geometry.setAttribute("color", new THREE.BufferAttribute(new Float32Array(size), 3));
    const mesh = new THREE.Mesh(geometry, new THREE.MeshStandardMaterial({vertexColors: true, roughness: 0.75}));
    mesh.position.set(...person.translation[number]);
    mesh.userData.number = number;
    const lines = [];
    person.parents.forEach((parent, joint) => {
      if (parent >= 0) for (const end of [joint, parent])
        for (let axis = 0; axis < 3; axis++) lines.push(data.joints[(number * person.parents.length + end) * 3 + axis] * person.unit);
    });
    const bones = new THREE.BufferGeometry().setAttribute("position", new THREE.Float32BufferAttribute(lines, 3));
    mesh.skeleton = new THREE.LineSegments(bones, new THREE.LineBasicMaterial({color: 0x1b2a49, depthTest: false}));
    mesh.skeleton.renderOrder = 2;
    const knobs = new THREE.Float32BufferAttribute(
      data.joints.subarray(number * 3 * person.parents.length, (number + 1) * 3 * person.parents.length), 3);
    for (let i = 0; i < knobs.array.length; i++) knobs.array[i] *= person.unit;
    const dots = new THREE.Points(
      new THREE.BufferGeometry().setAttribute("position", knobs),
      new THREE.PointsMaterial({color: 0x1b2a49, size: 6, sizeAttenuation: false, depthTest: false}));
    dots.renderOrder = 2;
    mesh.skeleton.add(dots);
    mesh.add(mesh.skeleton);
    world.add(mesh);
    return bodies[number] = mesh;
  }

  // ---- colours -----------------------------------------------------------------------------------------------------
  const heat = share => {  // 0..1 -> colour; the stops of hmdiff's heat maps
    const place = Math.min(Math.max(share, 0), 1) * (person.heat.length - 1), low = Math.min(Math.floor(place), person.heat.length - 2);
    return person.heat[low].map((value, channel) => value + (place - low) * (person.heat[low + 1][channel] - value));
  };
  const own = number => number ? person.palette[(number - 1) % person.palette.length] : [0.75, 0.75, 0.78];
  const css = rgb => `rgb(${rgb.map(value => Math.round(255 * value)).join(",")})`;
  const linear = rgb => new THREE.Color(...rgb).convertSRGBToLinear();

  function paint(mesh) {
    const colours = mesh.geometry.attributes.color, map = person.maps[find("colour").value];
    const values = map && data[map.array];
    const plain = linear(own(mesh.userData.number));
    for (let v = 0; v < size / 3; v++) {
      const tint = values ? linear(heat((values[v] * map.scale - map.lowest) / (map.highest - map.lowest))) : plain;
      colours.setXYZ(v, tint.r, tint.g, tint.b);
    }
    colours.needsUpdate = true;
    mesh.userData.painted = find("colour").value;
  }

  // ---- drawing -----------------------------------------------------------------------------------------------------
  const panelWidth = () => find("panel").hidden ? 0 : find("panel").offsetWidth;
  let byPhoto = true;  // view of the photo's camera; false: free

  function project() {
    const w = Math.max(1, innerWidth - panelWidth()), h = innerHeight;
    renderer.setPixelRatio(devicePixelRatio);
    renderer.setSize(w, h);
    controls.handleResize();
    const fit = Math.min(w / width, h / height);
    if (byPhoto) {
      // The pinhole of the crop, fitted into the window: pixel = fit * (focal * x / z + principal point) + margin.
      const near = camera.near, f = focal * fit, x = (w - width * fit) / 2 + cx * fit, y = (h - height * fit) / 2 + cy * fit;
      camera.projectionMatrix.makePerspective(-x * near / f, (w - x) * near / f, y * near / f, -(h - y) * near / f, near, camera.far);
      camera.projectionMatrixInverse.copy(camera.projectionMatrix).invert();
    } else {
      camera.aspect = w / h;
      camera.fov = 2 * Math.atan(Math.max(height, width * h / w) / 2 / focal) * 180 / Math.PI;
      camera.updateProjectionMatrix();
    }
  }

  function look(degrees) {  // null: the photo camera's view; else the angle around the person
    byPhoto = degrees === null;
    camera.up.set(0, 1, 0);
    if (byPhoto) {
      controls.target.set(0, 0, pelvis.z);
      camera.position.set(0, 0, 0);
    } else {
      controls.target.copy(pelvis);
      camera.position.copy(pelvis).negate().applyAxisAngle(camera.up, degrees * Math.PI / 180).add(pelvis);
    }
    camera.lookAt(controls.target);
    project();
    draw();
  }

  function draw() {
    const opacity = Number(find("opacity").value), skeleton = find("skeleton").checked;
    for (const number of shown) {
      const mesh = body(number);
      if (mesh.userData.painted !== find("colour").value) paint(mesh);
      Object.assign(mesh.material, {transparent: opacity < 1, opacity});
      mesh.skeleton.visible = skeleton;
    }
    bodies.forEach((mesh, number) => { if (mesh) mesh.visible = shown.has(number); });
    backdrop.visible = find("photo").checked;
    sun.position.copy(camera.position).add(new THREE.Vector3(-0.6, 1.2, 0.4));
    sun.target.position.copy(pelvis);
    renderer.render(scene, camera);
  }

  // ---- controls ----------------------------------------------------------------------------------------------------
  const name = number => number === 0 ? "mean" : `hypothesis ${number - 1}` + (number === person.selected + 1 ? " (selected)" : "");
  const boxes = bodies.map((_, number) => {
    const label = document.createElement("label");
    label.innerHTML = `<input type="checkbox"><span class="dot" style="background:${css(own(number))}"></span><span></span>`;
    label.lastChild.textContent = name(number);
    label.firstChild.onchange = () => show(number, label.firstChild.checked);
    find("nodes").append(label);
    return label.firstChild;
  });

  function show(number, on) {
    find("stepped").textContent = "";
    shown[on ? "add" : "delete"](number);
    boxes[number].checked = on;
    draw();
  }
  function showOnly(numbers) {
    find("stepped").textContent = "";
    boxes.forEach((box, number) => { box.checked = numbers.includes(number); });
    shown.clear();
    numbers.forEach(number => shown.add(number));
    draw();
  }

  const paths = {
    modes: [[0, "mean of all"], ...person.modes.map((mode, k) =>
      [mode.hypothesis + 1, `mode ${k + 1} of ${person.modes.length}: ${Math.round(100 * mode.weight)} % of the hypotheses`])],
    hypotheses: bodies.map((_, number) => [number, name(number)]),
  };
  for (const key of Object.keys(paths)) find("through").add(new Option(key));
  function step() {
    const path = paths[find("through").value];
    find("step").max = path.length - 1;
    const [number, words] = path[Math.min(Number(find("step").value), path.length - 1)];
    showOnly([number]);
    find("stepped").textContent = words;
  }
  find("through").onchange = () => { find("step").value = 0; step(); };
  find("step").oninput = step;

  find("colour").add(new Option("one colour a body", ""));
  for (const [key, map] of Object.entries(person.maps)) find("colour").add(new Option(map.label, key));
  find("colour").onchange = () => {
    const map = person.maps[find("colour").value];
    find("legend").style.display = map ? "block" : "none";
    if (map) {
      find("bar").style.background = `linear-gradient(90deg, ${person.heat.map(css).join(",")})`;
      find("ends").innerHTML = `<span>${map.lowest} ${map.unit}</span><span>${map.highest} ${map.unit}</span>`;
    }
    draw();
  };
  find("about").textContent = person.about;
  for (const id of ["photo", "skeleton", "opacity"]) find(id).oninput = draw;
  find("all").onclick = () => showOnly(boxes.map((_, number) => number).slice(count > 1 ? 1 : 0));
  find("none").onclick = () => showOnly([]);
  find("camera").onclick = () => look(null);
  find("side").onclick = () => look(90);
  find("back").onclick = () => look(180);
  addEventListener("resize", () => { project(); draw(); });
  controls.addEventListener("start", () => {
    if (!byPhoto) return;
    byPhoto = false;  // switch to the free view at the same position, orbiting the person
    controls.target.copy(pelvis);
    project();
  });
  controls.addEventListener("change", () => { if (!byPhoto) draw(); });
  (function turn() { requestAnimationFrame(turn); if (!byPhoto) controls.update(); })();

  // ---- values under the pointer --------------------------------------------------------------------------------------
  const ray = new THREE.Raycaster();
  function values(x, y) {
    const rect = renderer.domElement.getBoundingClientRect();
    ray.setFromCamera(new THREE.Vector2(2 * (x - rect.left) / rect.width - 1, 1 - 2 * (y - rect.top) / rect.height), camera);
    const hit = ray.intersectObjects([...shown].map(number => bodies[number]).filter(Boolean), false)[0];
    if (!hit) return null;
    const mesh = hit.object, number = mesh.userData.number, at = mesh.geometry.attributes.position;
    const local = mesh.worldToLocal(hit.point.clone());
    const corners = [hit.face.a, hit.face.b, hit.face.c].map(v => [v, local.distanceTo(new THREE.Vector3().fromBufferAttribute(at, v))]);
    const vertex = corners.sort((a, b) => a[1] - b[1])[0][0];
    let joint = 0, nearest = Infinity;
    for (let j = 0; j < person.joint_names.length; j++) {
      const place = new THREE.Vector3().fromArray(data.joints, (number * person.joint_names.length + j) * 3).multiplyScalar(person.unit);
      if (place.distanceTo(local) < nearest) [joint, nearest] = [j, place.distanceTo(local)];
    }
    const lines = [name(number), `vertex ${vertex}, near ${person.joint_names[joint]}`];
    lines.push(`x ${local.x.toFixed(2)}, y ${local.y.toFixed(2)}, z ${local.z.toFixed(2)} m from the pelvis`);
    for (const map of Object.values(person.maps)) lines.push(`${map.label}: ${(data[map.array][vertex] * map.scale).toFixed(map.digits)} ${map.unit}`);
    return lines.join("\n");
  }
  renderer.domElement.addEventListener("pointermove", event => {
    const text = event.buttons ? null : values(event.clientX, event.clientY);
    find("pointer").style.display = text ? "block" : "none";
    if (text) Object.assign(find("pointer").style, {left: `${event.clientX + 14}px`, top: `${event.clientY + 14}px`});
    find("pointer").textContent = text || "";
  });

  // ---- the first view; #mean, #colour=spread&photo=0 ... in the URL select another ------------------------------------
  const asked = new URLSearchParams(location.hash.slice(1));
  find("panel").hidden = asked.get("panel") === "0";
  find("photo").checked = asked.get("photo") !== "0";
  find("skeleton").checked = asked.get("skeleton") === "1";
  const colour = asked.get("colour");  // a prefix is enough, such as "confidence"
  find("colour").value = colour && Object.keys(person.maps).find(key => key.startsWith(colour)) || "";
  find("through").value = "modes";
  step();
  find("colour").onchange();
  if (asked.has("show")) showOnly(asked.get("show").split(",").map(Number).filter(number => number >= 0 && number < count));
  look(asked.has("view") ? Number(asked.get("view")) : null);
  return {show, showOnly, values, look, shown, canvas: renderer.domElement};
}

const ready = {photo: false};
start().then(viewer => {
  window.viewer = viewer;
  document.body.dataset.ready = "yes";
}).catch(error => {
  find("about").textContent = `This page cannot be shown: ${error.message}. It needs WebGL and a browser of 2023 or later.`;
  document.body.dataset.ready = "failed";
});

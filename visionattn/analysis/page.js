"use strict";
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const make = (tag, parent, text) => {
    const node = parent.appendChild(document.createElement(tag));
    if (text !== undefined) node.textContent = text;
    return node;
  };

  // Data: bytes, deflated, as base64
  const bytes = async (text) => {
    const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  };
  const floats = async (text) => new Float32Array((await bytes(text)).buffer);
  const unpack = async (layer) => {
    layer.cells = await bytes(layer.cells);
    const rows = await floats(layer.rows);
    const n = layer.heads * layer.asked;
    [layer.low, layer.high, layer.prefix, layer.padding] = [0, 1, 2, 3].map((i) => rows.subarray(i * n, (i + 1) * n));
    return layer;
  };
  await Promise.all([...data.layers, ...(data.rollout.layer ? [data.rollout.layer] : [])].map(unpack));
  for (const picture of [...data.gradcam.maps, ...data.field.maps]) {
    const raw = await bytes(picture.cells);
    picture.values = Float32Array.from(raw, (v) => v / 255);
  }
  for (const stage of data.features.maps) {
    stage.colours = await bytes(stage.cells);
    stage.grids = await bytes(stage.channelCells);
  }
  const photo = new Image();
  photo.src = data.image.source;
  await photo.decode();

  // Colours
  const STOPS = [[0, 0, 4], [40, 11, 84], [101, 21, 110], [159, 42, 99], [212, 72, 66], [245, 125, 21], [250, 193, 39], [252, 255, 164]];
  const heat = (t) => {
    const x = Math.min(Math.max(t, 0), 1) * (STOPS.length - 1), i = Math.min(Math.floor(x), STOPS.length - 2), f = x - i;
    return STOPS[i].map((a, c) => a + f * (STOPS[i + 1][c] - a));
  };
  const HEAT = Array.from({ length: 256 }, (_, i) => heat(i / 255));
  const css = (c) => `rgb(${c.map(Math.round).join(" ")})`;
  const RAMP = `linear-gradient(90deg, ${STOPS.map(css).join(", ")})`;
  const SIGNED = "linear-gradient(90deg, rgb(56 130 246), rgb(20 20 24), rgb(249 115 22))";
  const percent = (v) => (100 * v).toFixed(Math.abs(v) >= 0.0995 ? 0 : Math.abs(v) >= 0.00995 ? 1 : 2) + "\u00a0%";

  // State
  const state = { tab: "attention", head: -1, row: 0, column: 0, token: false, pinned: false, choice: {}, channel: 0, part: -1 };
  const tabs = [
    ["attention", "Attention", data.layers.length ? "" : data.reason],
    ["rollout", "Rollout", data.rollout.reason],
    ["gradcam", "Grad-CAM", data.gradcam.reason],
    ["field", "Receptive field", data.field.reason],
    ["features", "Features", data.features.reason],
  ];
  const reasonOf = (tab) => tabs.find((t) => t[0] === tab)[2] || "";
  const interactive = () => (state.tab === "attention" || state.tab === "rollout") && !reasonOf(state.tab);
  const items = () => ({ attention: data.layers, rollout: data.rollout.layer ? [data.rollout.layer] : [], gradcam: data.gradcam.maps, field: data.field.maps, features: data.features.maps })[state.tab];
  const chosen = () => Math.min(state.choice[state.tab] ?? ({ attention: data.start, gradcam: 0 }[state.tab] ?? items().length - 1), items().length - 1);
  const current = () => items()[chosen()];

  // Weights
  const queryOf = (layer) => {
    if (layer.same) return 0;
    if (layer.amongChannels) return Math.min(Math.floor((state.row / data.grid[0]) * layer.size[0]), layer.size[0] - 1);
    if (state.token && layer.token) return layer.asked - 1;
    const nearest = (list, share, n) => list.reduce((best, v, i) => (Math.abs(v + 0.5 - share * n) < Math.abs(list[best] + 0.5 - share * n) ? i : best), 0);
    const r = nearest(layer.askedRows, (state.row + 0.5) / data.grid[0], layer.size[0]);
    const c = nearest(layer.askedColumns, (state.column + 0.5) / data.grid[1], layer.size[1]);
    return r * layer.askedColumns.length + c;
  };
  const askedCell = (layer) => {
    const q = queryOf(layer), n = layer.askedColumns.length;
    return [layer.askedRows[Math.floor(q / n)], layer.askedColumns[q % n]];
  };
  const rowOf = (layer, head, q) => {
    const n = layer.keys[0] * layer.keys[1], heads = head < 0 ? [...Array(layer.heads).keys()] : [head];
    const out = new Float32Array(n);
    for (const h of heads) {
      const i = h * layer.asked + q, low = layer.low[i], step = (layer.high[i] - low) / 255 / heads.length;
      for (let k = 0; k < n; k++) out[k] += low / heads.length + step * layer.cells[i * n + k];
    }
    return out;
  };
  const aside = (layer, list, head, q) => {
    const heads = head < 0 ? [...Array(layer.heads).keys()] : [head];
    return heads.reduce((sum, h) => sum + list[h * layer.asked + q], 0) / heads.length;
  };
  const matrixOf = (layer, head) => {
    const d = layer.size[0], out = new Float32Array(d * d);
    for (let q = 0; q < d; q++) out.set(rowOf(layer, head, q), q * d);
    return out;
  };

  // Drawing
  const largest = (values) => values.reduce((m, v) => Math.max(m, Math.abs(v)), 0);
  const smallest = (values) => values.reduce((m, v) => Math.min(m, v), Infinity);
  const bitmap = (values, h, w, { solid = false, signed = false } = {}) => {
    const canvas = document.createElement("canvas"), top = largest(values) || 1;
    const base = $("stretch").checked && !signed ? smallest(values) : 0, span = top - base || 1;
    [canvas.width, canvas.height] = [w, h];
    const pixels = new ImageData(w, h);
    for (let i = 0; i < h * w; i++) {
      const t = (values[i] - base) / span;
      let colour = HEAT[Math.round(255 * Math.min(Math.max(t, 0), 1))], alpha = Math.min(1, Math.abs(t)) ** 0.55;
      if (signed) {
        const full = t < 0 ? [56, 130, 246] : [249, 115, 22];
        colour = solid ? full.map((c, k) => [20, 20, 24][k] + alpha * (c - [20, 20, 24][k])) : full;
      }
      pixels.data.set([...colour, solid ? 255 : 255 * alpha], 4 * i);
    }
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    return canvas;
  };
  const coloured = (rgb, h, w, channels) => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [w, h];
    const pixels = new ImageData(w, h);
    for (let i = 0; i < h * w; i++) {
      const c = channels === 3 ? rgb.subarray(3 * i, 3 * i + 3) : [rgb[i], rgb[i], rgb[i]];
      pixels.data.set([c[0], c[1], c[2], 255], 4 * i);
    }
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    return canvas;
  };
  const view = $("view"), ctx = view.getContext("2d");
  const size = [Math.round((960 * data.image.size[0]) / data.image.size[1]), 960];
  const outline = (x, y, w, h, dash) => {
    ctx.setLineDash(dash || []);
    for (const [colour, width] of [["rgb(0 0 0 / .75)", dash ? 4 : 7], [dash ? "#fff" : "#2fe0ff", dash ? 2 : 4]]) {
      ctx.strokeStyle = colour;
      ctx.lineWidth = width;
      ctx.strokeRect(x, y, w, h);
    }
    ctx.setLineDash([]);
  };
  const drawPhoto = (veil) => {
    [view.width, view.height] = [size[1], size[0]];
    ctx.imageSmoothingEnabled = true;
    ctx.drawImage(photo, 0, 0, size[1], size[0]);
    ctx.fillStyle = `rgb(8 6 16 / ${veil})`;
    ctx.fillRect(0, 0, size[1], size[0]);
  };
  const overlay = (canvas, alpha) => {
    ctx.globalAlpha = alpha;
    ctx.imageSmoothingEnabled = $("smooth").checked;
    ctx.imageSmoothingQuality = "high";
    ctx.drawImage(canvas, 0, 0, view.width, view.height);
    ctx.globalAlpha = 1;
  };

  const place = (k, columns) => `row ${Math.floor(k / columns) + 1}, column ${(k % columns) + 1}`;
  const top5 = (values, count = 4) => [...values.keys()].sort((a, b) => Math.abs(values[b]) - Math.abs(values[a])).slice(0, count).filter((k) => values[k] !== 0);
  const scaleBar = (low, high, ramp) => {
    $("scale").hidden = !ramp;
    [$("low").textContent, $("high").textContent, $("ramp").style.background] = [low, high, ramp];
  };
  const sentence = (parts) => {
    $("say").replaceChildren();
    for (const [tag, text] of parts) tag ? make(tag, $("say"), text) : $("say").append(text);
  };

  const drawAttention = () => {
    const layer = current(), q = queryOf(layer), strength = $("strength").value / 100;
    if (layer.amongChannels) {
      const d = layer.size[0], matrix = matrixOf(layer, state.head), row = rowOf(layer, state.head, q);
      [view.width, view.height] = [960, 960];
      ctx.imageSmoothingEnabled = false;
      ctx.drawImage(bitmap(matrix, d, d, { solid: true }), 0, 0, 960, 960);
      outline(0, (q * 960) / d, 960, 960 / d);
      scaleBar("0", percent(largest(matrix)), RAMP);
      sentence([["b", `Channel ${q + 1}`], ["", ` of ${state.head < 0 ? "a group (mean of groups)" : `group ${state.head + 1}`} takes from `],
        ["", top5(row).map((k) => `channel ${k + 1} (${percent(row[k])})`).join("; ")], ["em", ". Rows are channels of the output, columns of the input."]]);
      return;
    }
    const [h, w] = layer.keys, values = rowOf(layer, state.head, q), most = largest(values);
    drawPhoto(0.62 * strength);
    overlay(bitmap(values, h, w, { signed: layer.signed }), strength);
    const [H, W] = layer.size, cell = [size[0] / H, size[1] / W];
    const [r, c] = layer.same ? [0, 0] : askedCell(layer);
    const ofToken = state.token && layer.token;
    if (layer.regions && !ofToken) {
      const [gh, gw] = layer.regions.grid, [rh, rw] = [size[0] / H * layer.regions.span[0], size[1] / W * layer.regions.span[1]];
      const region = Math.floor(r / layer.regions.span[0]) * gw + Math.floor(c / layer.regions.span[1]);
      for (const p of layer.regions.index[region]) outline((p % gw) * rw + 2, Math.floor(p / gw) * rh + 2, rw - 4, rh - 4, [8, 6]);
    }
    if (!layer.same && !ofToken) outline(c * cell[1], r * cell[0], cell[1], cell[0]);
    const shares = layer.signed ? (v) => v.toPrecision(2) : percent;
    scaleBar(layer.signed ? shares(-most) : $("stretch").checked ? shares(smallest(values)) : "0", shares(most), layer.signed ? SIGNED : RAMP);
    const who = layer.same ? "Every token" : ofToken ? "The class token" : `Row ${r + 1}, column ${c + 1}`;
    const verb = state.tab === "rollout" ? " comes from " : " attends to ";
    const others = [];
    const onTokens = aside(layer, layer.prefix, state.head, q), outside = aside(layer, layer.padding, state.head, q);
    if (layer.token) others.push(`class token (${shares(onTokens)})`);
    if (Math.abs(outside) > 0.0005) others.push(`padding (${shares(outside)})`);
    const pooled = layer.keys[0] === H ? "" : `${h} x ${w} map: `;
    sentence([["b", who], ["em", ` of ${H} x ${W}`], ["", verb], ["em", pooled], ["", top5(values).map((k) => `${place(k, w)} (${shares(values[k])})`).join("; ") || "nothing"],
      ["", others.length ? `; ${others.join(", ")}` : ""], ["em", state.pinned && !layer.same ? ". Pinned: click it again to let go." : "."]]);
  };
  const drawStill = () => {
    const item = current(), strength = $("strength").value / 100;
    if (state.tab === "features") {
      const [h, w] = item.size, n = h * w;
      drawPhoto(0);
      const part = state.part < 0 ? coloured(item.colours, h, w, 3) : coloured(item.grids.subarray(state.part * n, (state.part + 1) * n), h, w, 1);
      overlay(part, strength);
      scaleBar("", "", "");
    } else {
      drawPhoto(0.62 * strength);
      overlay(bitmap(item.values, ...item.size, {}), strength);
      scaleBar(item.low, item.high, RAMP);
    }
    sentence([["b", item.title], ["", `: ${item.text}`]]);
  };
  const draw = () => {
    const reason = reasonOf(state.tab);
    $("reason").hidden = !reason;
    $("reason").textContent = reason;
    view.hidden = $("tools").hidden = !!reason;
    if (reason) {
      sentence([]);
      scaleBar("", "", "");
    } else if (interactive()) drawAttention();
    else drawStill();
    thumbnails();
  };

  // Thumbnails: buttons that are made once for a tab and a layer, and drawn again for each query
  const button = (box, label, press) => {
    const node = make("button", box);
    node.type = "button";
    node.title = label;
    node.setAttribute("aria-label", label);
    make("canvas", node);
    node.addEventListener("click", press);
    return node;
  };
  const paint = (node, canvas, pressed) => {
    const own = node.firstChild;
    [own.width, own.height] = [canvas.width, canvas.height];
    own.getContext("2d").drawImage(canvas, 0, 0);
    node.setAttribute("aria-pressed", pressed);
  };
  const small = (item, head) => {
    if (state.tab === "features") return coloured(item.colours, ...item.size, 3);
    if (item.values) return bitmap(item.values, ...item.size, { solid: true });
    if (item.amongChannels) return bitmap(matrixOf(item, head), item.size[0], item.size[0], { solid: true });
    return bitmap(rowOf(item, head, queryOf(item)), ...item.keys, { solid: true, signed: item.signed });
  };
  const build = () => {
    const list = items(), layer = list[chosen()], empty = !!reasonOf(state.tab);
    $("layers").replaceChildren();
    $("heads").replaceChildren();
    $("notes").replaceChildren();
    $("layer-box").hidden = empty || list.length < 2;
    $("head-box").hidden = true;
    $("panel").toggleAttribute("data-still", !interactive());
    $("token").hidden = !(interactive() && layer.token && !layer.same);
    $("help").textContent = !interactive() || layer.same ? "" : layer.amongChannels ? "Point at a row, click to keep it, or use the arrow keys." : "Point at a patch; click to keep it. Arrow keys move, [ and ] change the layer.";
    view.setAttribute("aria-label", interactive() ? `What a patch attends to, ${layer ? layer.name : ""}. Arrow keys choose the patch.` : "Map over the image");
    view.setAttribute("role", interactive() ? "application" : "img"); // an application gets the arrow keys
    if (empty) return;
    $("layer-name").textContent = layer.kind ? `${layer.name}: ${layer.kind}` : layer.name;
    list.forEach((item, i) => {
      const node = button($("layers"), item.kind ? `${item.name}: ${item.kind}` : item.name, () => choose(i));
      make("span", node, item.short);
    });
    if (interactive() && layer.heads > 1) {
      $("head-box").hidden = false;
      $("head-title").textContent = layer.amongChannels ? "Group" : "Head";
      for (let h = -1; h < layer.heads; h++) {
        const gate = h >= 0 && layer.gates ? layer.gates[h] : null;
        const label = h < 0 ? `mean of ${layer.heads}` : gate === null ? `${h + 1}` : `${h + 1}: ${layer.gateLabel} ${percent(gate)}`;
        const node = button($("heads"), `${layer.amongChannels ? "group" : "head"} ${label}`, () => { state.head = h; draw(); });
        if (gate !== null) make("div", node).className = "gate";
        if (gate !== null) node.lastChild.style.setProperty("--share", percent(Math.min(1, gate)));
        make("span", node, h < 0 ? "mean" : gate === null ? label : `${h + 1}: ${percent(gate)}`);
      }
    }
    if (state.tab === "features") {
      $("head-box").hidden = false;
      $("head-title").textContent = "Channel";
      layer.numbers.forEach((number, i) => {
        const node = button($("heads"), `channel ${number + 1}`, () => { state.part = state.part === i ? -1 : i; draw(); });
        make("span", node, `${number + 1}`);
      });
    }
    for (const note of layer.notes || []) make("li", $("notes"), note);
  };
  const thumbnails = () => {
    if (reasonOf(state.tab)) return;
    items().forEach((item, i) => { if ($("layers").children[i] && !$("layer-box").hidden) paint($("layers").children[i], small(item, -1), i === chosen()); });
    const layer = current();
    [...$("heads").children].forEach((node, i) => {
      if (state.tab === "features") {
        const n = layer.size[0] * layer.size[1];
        paint(node, coloured(layer.grids.subarray(i * n, (i + 1) * n), ...layer.size, 1), i === state.part);
      } else paint(node, small(layer, i - 1), i - 1 === state.head);
    });
    $("token").setAttribute("aria-pressed", state.token);
  };
  const choose = (i) => {
    state.choice[state.tab] = Math.min(Math.max(i, 0), items().length - 1);
    state.head = state.head < (current().heads || 0) ? state.head : -1;
    state.part = -1;
    const focus = $("layers").contains(document.activeElement);
    build();
    draw();
    if (focus && $("layers").children[chosen()]) $("layers").children[chosen()].focus();
  };

  // Input
  const at = (event) => {
    const box = view.getBoundingClientRect(), clip = (v, n) => Math.min(Math.max(Math.floor(v * n), 0), n - 1);
    return [clip((event.clientY - box.top) / box.height, data.grid[0]), clip((event.clientX - box.left) / box.width, data.grid[1])];
  };
  const move = (row, column) => {
    if (row === state.row && column === state.column && !state.token) return;
    [state.row, state.column, state.token] = [row, column, false];
    draw();
  };
  view.addEventListener("pointermove", (e) => { if (interactive() && !state.pinned) move(...at(e)); });
  view.addEventListener("click", (e) => {
    if (!interactive()) return;
    const [row, column] = at(e), layer = current(), before = queryOf(layer), was = state.pinned && !state.token;
    [state.row, state.column, state.token] = [row, column, false];
    state.pinned = !(was && queryOf(layer) === before);
    draw();
  });
  view.addEventListener("keydown", (e) => {
    if (!interactive()) return;
    const layer = current(), step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[e.key];
    if (step) {
      e.preventDefault();
      if (layer.same) return;
      const rows = layer.askedRows, columns = layer.askedColumns, q = queryOf({ ...layer, token: false }), n = columns.length;
      const r = Math.min(Math.max(Math.floor(q / n) + step[0], 0), rows.length - 1), c = Math.min(Math.max((q % n) + step[1], 0), n - 1);
      state.pinned = true;
      move(Math.floor(((rows[r] + 0.5) * data.grid[0]) / layer.size[0]), Math.floor(((columns[c] + 0.5) * data.grid[1]) / layer.size[1]));
      draw();
    } else if (e.key === "[" || e.key === "]") choose(chosen() + (e.key === "]" ? 1 : -1));
    else if (e.key === "Escape") { state.pinned = false; draw(); }
  });
  $("token").addEventListener("click", () => { state.token = !state.token; state.pinned = state.token; draw(); });
  for (const id of ["strength", "smooth", "stretch"]) $(id).addEventListener("input", draw);

  // Tabs
  const open = (tab, focus) => {
    state.tab = tab;
    state.head = -1;
    state.part = -1;
    state.token = tab === "rollout" && !!(data.rollout.layer && data.rollout.layer.token);
    state.pinned = state.token;
    for (const node of $("tabs").children) {
      const on = node.dataset.tab === tab;
      node.setAttribute("aria-selected", on);
      node.tabIndex = on ? 0 : -1;
      if (on && focus) node.focus();
    }
    $("panel").setAttribute("aria-labelledby", `tab-${tab}`);
    build();
    draw();
  };
  for (const [tab, title, reason] of tabs) {
    const node = make("button", $("tabs"), title);
    Object.assign(node, { type: "button", id: `tab-${tab}` });
    node.dataset.tab = tab;
    if (reason) node.dataset.empty = "";
    node.setAttribute("role", "tab");
    node.setAttribute("aria-controls", "panel");
    node.addEventListener("click", () => open(tab));
    node.addEventListener("keydown", (e) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key], i = tabs.findIndex((t) => t[0] === tab);
      if (step) open(tabs[(i + step + tabs.length) % tabs.length][0], true);
    });
  }

  // Start
  $("model").textContent = data.model;
  $("origin").textContent = [data.title, data.origin].filter(Boolean).join(" · ");
  for (const [name, share] of data.prediction) {
    const item = make("li", $("prediction"));
    make("span", item, name);
    make("i", item).style.setProperty("--share", `${100 * share}%`);
    make("span", item, percent(share));
  }
  [state.row, state.column] = data.query;
  open(data.layers.length ? "attention" : "gradcam");
  document.body.dataset.ready = "";
})();

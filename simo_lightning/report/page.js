// The interactive map and matrix: Bokeh draws them; this connects them with the controls of the page.
(async () => {
  "use strict";
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const coarse = matchMedia("(pointer: coarse)").matches;

  // A box beside the pointer, of the element with the plot.
  const makeTip = (place) => {
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.setAttribute("role", "status");
    tip.hidden = true;
    place.append(tip);
    return {
      show(x, y, ...content) {
        tip.replaceChildren(...content);
        tip.hidden = false;
        const left = x + 16 + tip.offsetWidth > place.clientWidth ? x - 16 - tip.offsetWidth : x + 16;
        tip.style.left = `${Math.max(0, Math.min(left, place.clientWidth - tip.offsetWidth))}px`;
        tip.style.top = `${Math.max(0, Math.min(y + 16, place.clientHeight - tip.offsetHeight))}px`;
      },
      hide() { tip.hidden = true; },
    };
  };
  const element = (tag, text, className = "") => {
    const made = document.createElement(tag);
    made.textContent = text;
    made.className = className;
    return made;
  };
  const draw = async (id, item) => {
    const views = await Bokeh.embed.embed_item(item, id);
    const view = [...views][0];
    const plot = view.model;
    if (coarse) plot.toolbar.active_drag = null;  // a finger scrolls the page
    return {plot, view, model: (name) => plot.document.get_model_by_name(name)};
  };
  // The centre of a place in data coordinates, in pixels of the plot's element.
  const onScreen = (view, x, y) => [view.frame.x_scale.compute(x), view.frame.y_scale.compute(y)];

  const place = document.getElementById("map");
  if (place) {
    const map = data.map;
    const {plot, view, model} = await draw("map", map.document);
    const source = model("points"), shown = model("shown"), marked = model("marked"), base = model("base");
    const columns = source.data;
    const labels = columns.label;
    const visible = new Set(map.classes.map((each) => each.label));
    const highlighted = new Set();
    const tip = makeTip(place);
    let current = -1;

    const card = (index) => {
      const content = [];
      const cell = map.cells ? map.cells[index] : -1;
      if (cell >= 0) {
        const {columns: across, rows, width, height} = map.sprite;
        const scale = 112 / Math.max(width, height);
        const image = element("span", "", "thumb");
        image.setAttribute("role", "img");
        image.setAttribute("aria-label", `${data.names[labels[index]]}, ${map.titles[index]}`);
        image.style.width = `${width * scale}px`;
        image.style.height = `${height * scale}px`;
        image.style.backgroundSize = `${across * width * scale}px ${rows * height * scale}px`;
        image.style.backgroundPosition =
          `${-(cell % across) * width * scale}px ${-Math.floor(cell / across) * height * scale}px`;
        content.push(image);
      }
      content.push(element("b", data.names[labels[index]]), element("span", map.titles[index]));
      return content;
    };
    const show = (index) => {
      current = index;
      if (index < 0) { tip.hide(); return; }
      tip.show(...onScreen(view, source.data.x[index], source.data.y[index]), ...card(index));
    };
    const nearest = (x, y) => {
      const {x: xs, y: ys} = source.data;
      const unit = view.frame.bbox.width / (plot.x_range.end - plot.x_range.start);
      let best = -1, least = (coarse ? 24 : 14) / unit;
      least *= least;
      for (let i = 0; i < xs.length; i++) {
        if (!visible.has(labels[i])) continue;
        const distance = (xs[i] - x) ** 2 + (ys[i] - y) ** 2;
        if (distance < least) { least = distance; best = i; }
      }
      return best;
    };
    plot.on_event("mousemove", (event) => show(nearest(event.x, event.y)));
    plot.on_event("tap", (event) => show(nearest(event.x, event.y)));
    plot.on_event("mouseleave", () => tip.hide());
    place.addEventListener("keydown", (event) => {
      const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
      if (event.key === "Escape") tip.hide();
      if (!step || visible.size === 0) return;
      event.preventDefault();
      let next = current;
      do next = (Math.max(next, step < 0 ? 0 : -1) + step + labels.length) % labels.length;
      while (!visible.has(labels[next]));
      show(next);
    });

    const draws = () => {
      tip.hide();
      shown.booleans = Array.from(labels, (label) => visible.has(label));
      marked.booleans = Array.from(labels, (label) => highlighted.has(label));
      base.glyph.fill_alpha = base.glyph.line_alpha = highlighted.size ? 0.12 : 0.8;
      source.change.emit();
    };
    document.getElementById("projections").addEventListener("change", (event) => {
      const chosen = map.projections.find((each) => each.name === event.target.value);
      tip.hide();
      source.data = {...source.data, x: columns[`${chosen.name}_x`], y: columns[`${chosen.name}_y`]};
      const [[left, right], [bottom, top]] = chosen.limits;
      plot.x_range.setv({start: left, end: right, reset_start: left, reset_end: right});
      plot.y_range.setv({start: bottom, end: top, reset_start: bottom, reset_end: top});
      document.getElementById("map-text").textContent = chosen.text;
      document.getElementById("map-alt").textContent = chosen.alt;
    });
    const choose = (id, chosen) => {
      const controls = document.getElementById(id);
      if (!controls) return;
      const boxes = [...controls.querySelectorAll("input[type=checkbox]")];
      const apply = () => {
        chosen.clear();
        for (const box of boxes) if (box.checked) chosen.add(Number(box.value));
        draws();
      };
      controls.addEventListener("change", apply);
      for (const button of controls.querySelectorAll("button")) {
        button.addEventListener("click", () => {
          for (const box of boxes) box.checked = button.dataset.all === "1";
          apply();
        });
      }
      controls.querySelector("input[type=search]")?.addEventListener("input", (event) => {
        const wanted = event.target.value.trim().toLowerCase();
        for (const box of boxes) {
          const name = data.names[box.value].toLowerCase();
          box.closest("li").hidden = !name.includes(wanted);
        }
      });
      // a browser keeps the boxes of a page that is loaded again
      for (const box of boxes) box.checked = box.defaultChecked;
    };
    choose("classes", visible);
    choose("marks", highlighted);
  }

  const square = document.getElementById("matrix");
  if (square) {
    const {plot, view, model} = await draw("matrix", data.matrix.document);
    const cells = model("cells").data.image[0];
    const order = data.matrix.order, count = order.length;
    const tip = makeTip(square);
    let row = 0, column = 0;
    const show = () => {
      const value = cells[(count - 1 - row) * count + column];
      const [first, second] = [data.names[order[row]], data.names[order[column]]];
      const text = value === -128 ? "undefined" : (value / 100).toFixed(2);
      tip.show(
        ...onScreen(view, column, count - 1 - row),
        element("b", first), element("b", row === column ? "with itself" : second), element("span", `cosine ${text}`),
      );
    };
    const point = (event) => {
      const [x, y] = [Math.round(event.x), count - 1 - Math.round(event.y)];
      if (!(x >= 0 && y >= 0 && x < count && y < count)) { tip.hide(); return; }
      [row, column] = [y, x];
      show();
    };
    plot.on_event("mousemove", point);
    plot.on_event("tap", point);
    plot.on_event("mouseleave", () => tip.hide());
    square.addEventListener("keydown", (event) => {
      const step = {ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0]}[event.key];
      if (event.key === "Escape") tip.hide();
      if (!step) return;
      event.preventDefault();
      row = Math.max(0, Math.min(count - 1, row + step[0]));
      column = Math.max(0, Math.min(count - 1, column + step[1]));
      show();
    });
    // the names at the axes would leave a phone no place for the cells
    const fit = () => {
      const wide = square.clientWidth >= 560;
      for (const axis of [...plot.below, ...plot.left]) if ("major_label_overrides" in axis && "axis_label" in axis) axis.visible = wide;
    };
    fit();
    new ResizeObserver(fit).observe(square);
  }
  document.documentElement.dataset.ready = "true";
})();

"use strict";
(() => {
  const make = (name, text, className) => {
    const one = document.createElement(name);
    if (text !== undefined) one.textContent = text;
    if (className) one.className = className;
    return one;
  };

  // tables: a head is a button that sorts by its column
  const valueOf = (row, column) => {
    const cell = row.cells[column];
    return "v" in cell.dataset ? Number(cell.dataset.v) : null;
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    const body = table.tBodies[0];
    heads.forEach((head, column) => {
      const button = make("button", head.textContent);
      button.type = "button";
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const rising = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        const rows = [...body.rows];
        const numeric = rows.some((row) => valueOf(row, column) !== null);
        rows.sort((one, other) => {
          if (!numeric) {
            return rising * one.cells[column].textContent.localeCompare(other.cells[column].textContent, "en", { numeric: true });
          }
          const [a, b] = [valueOf(one, column), valueOf(other, column)];
          // what was not measured stays last either way
          if (a === null || b === null) return (a === null) - (b === null);
          return rising * (a - b);
        });
        heads.forEach((each) => each.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", rising === 1 ? "ascending" : "descending");
        body.append(...rows);
      });
    });
  }

  // rows of single clients are folded away where they are many
  const MANY = 12;
  for (const table of document.querySelectorAll("table")) {
    const details = table.querySelectorAll("tr.detail");
    if (details.length <= MANY) continue;
    const button = make("button", "", "fold");
    button.type = "button";
    const fold = (hidden) => {
      details.forEach((row) => (row.hidden = hidden));
      button.textContent = hidden ? `Show the ${details.length} clients` : "Hide the clients";
      button.setAttribute("aria-expanded", String(!hidden));
    };
    button.addEventListener("click", () => fold(button.getAttribute("aria-expanded") === "true"));
    fold(true);
    table.parentElement.before(button);
  }

  // legends: the line of a name stands out while the name is pointed to or chosen
  for (const charts of document.querySelectorAll(".charts")) {
    const items = [...charts.querySelectorAll(".legend li")];
    if (items.length < 2) continue;
    let chosen = "";
    const light = (series) => {
      charts.classList.toggle("lit", Boolean(series));
      for (const one of charts.querySelectorAll("g.line, .legend li")) {
        one.classList.toggle("on", (one.dataset.series ?? one.classList[1]) === series);
      }
    };
    for (const item of items) {
      const series = item.dataset.series;
      const button = make("button");
      button.type = "button";
      button.setAttribute("aria-pressed", "false");
      button.append(...item.childNodes);
      item.append(button);
      item.addEventListener("pointerenter", () => light(series));
      item.addEventListener("pointerleave", () => light(chosen));
      button.addEventListener("click", () => {
        chosen = chosen === series ? "" : series;
        for (const other of items) {
          other.firstChild.setAttribute("aria-pressed", String(other.dataset.series === chosen));
        }
        light(chosen);
      });
    }
  }

  // charts: the values at the place that the pointer or an arrow key points to
  const MOST = 12;
  for (const plot of document.querySelectorAll(".plot")) {
    const data = JSON.parse(plot.dataset.chart);
    const svg = plot.querySelector("svg");
    const cursor = svg.querySelector(".cursor");
    const box = svg.viewBox.baseVal;
    const tip = make("div", "", "tip");
    tip.hidden = true;
    plot.append(tip);
    let place = -1;
    const show = (next, height) => {
      place = Math.max(0, Math.min(data.x.length - 1, next));
      const x = data.x[place];
      cursor.setAttribute("d", `M${x} 8V216`);
      let lines = data.lines.filter((line) => line.y[place] !== null);
      if (height !== undefined && lines.length > MOST) {
        lines.sort((one, other) => Math.abs(one.y[place] - height) - Math.abs(other.y[place] - height));
      }
      const more = lines.length - MOST;
      lines = lines.slice(0, MOST).sort((one, other) => one.y[place] - other.y[place]);
      tip.replaceChildren(make("b", `${data.across} ${data.names[place]}`));
      for (const line of lines) {
        const row = make("div");
        const label = make("span");
        label.append(make("i", undefined, `dot ${line.series}`), line.label);
        row.append(label, make("span", line.text[place]));
        tip.append(row);
      }
      if (more > 0) tip.append(make("div", `and ${more} more`));
      tip.hidden = false;
      const left = x < box.width / 2;
      tip.style.left = left ? `calc(${(100 * x) / box.width}% + .75rem)` : "auto";
      tip.style.right = left ? "auto" : `calc(${100 - (100 * x) / box.width}% + .75rem)`;
    };
    const hide = () => {
      tip.hidden = true;
      cursor.setAttribute("d", "");
    };
    const point = (event) => {
      const area = svg.getBoundingClientRect();
      const scale = box.width / area.width;
      const x = (event.clientX - area.left) * scale;
      const apart = data.x.map((each) => Math.abs(each - x));
      show(apart.indexOf(Math.min(...apart)), (event.clientY - area.top) * scale);
    };
    plot.addEventListener("pointermove", point);
    plot.addEventListener("pointerdown", point);
    plot.addEventListener("pointerleave", hide);
    svg.setAttribute("tabindex", "0");
    svg.addEventListener("focus", () => show(data.x.length - 1));
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      show(place + step);
    });
  }

  // answers: rows are built from text alone, ten at a time
  const source = document.getElementById("texts");
  if (!source) return;
  const { models, rows } = JSON.parse(source.textContent);
  const find = (name) => document.getElementById(`texts-${name}`);
  const [search, group, differ, list, count] = ["search", "group", "differ", "rows", "count"].map(find);
  const PER_PAGE = 10;
  let start = 0;
  let found = rows;
  const shown = new Set(models.flatMap((model, place) => (model.shown ? [place] : [])));
  for (const name of new Set(rows.map((row) => row.group))) {
    const option = make("option", name || "(none)");
    option.value = JSON.stringify(name);
    group.append(option);
  }
  models.forEach((model, place) => {
    const label = make("label");
    const box = make("input");
    box.type = "checkbox";
    box.checked = shown.has(place);
    box.addEventListener("change", () => {
      if (box.checked) shown.add(place);
      else shown.delete(place);
      choose();
    });
    label.append(box, make("i", undefined, `dot ${model.series}`), model.label);
    find("models").append(label);
  });
  const textsOf = (row) => [row.asked, row.reference, ...row.turns.map((turn) => turn[1]), ...row.answers];
  const differs = (row) => {
    const answers = [...shown].map((place) => row.answers[place]).filter((answer) => answer !== null);
    return new Set(answers).size > 1;
  };
  const choose = () => {
    const words = search.value.toLowerCase();
    found = rows.filter(
      (row) =>
        (!group.value || JSON.stringify(row.group) === group.value) &&
        (!differ.checked || differs(row)) &&
        (!words || textsOf(row).some((text) => text && text.toLowerCase().includes(words))),
    );
    start = 0;
    draw();
  };
  const answer = (label, text, series, right) => {
    const one = make("div", undefined, series);
    const head = make("h4", label);
    if (right !== null) head.append(" ", make("span", right ? "✓ exact" : "✗ not exact", right ? "right" : "wrong"));
    const body = make("p", text === "" ? "(empty)" : text);
    body.dir = "auto";
    one.append(head, body);
    return one;
  };
  const card = (row) => {
    const one = make("article");
    one.tabIndex = -1;
    one.append(make("h3", row.group ? `${row.number} · ${row.group}` : String(row.number)));
    for (const [role, text] of row.turns) {
      const turn = make("p", undefined, "turn");
      turn.dir = "auto";
      turn.append(make("b", `${role}: `), text);
      one.append(turn);
    }
    const asked = make("p", row.asked, "asked");
    asked.dir = "auto";
    const side = make("div", undefined, "side");
    if (row.reference !== null) side.append(answer("reference", row.reference, "", null));
    models.forEach((model, place) => {
      if (shown.has(place) && row.answers[place] !== null) {
        side.append(answer(model.label, row.answers[place], model.series, row.exact[place]));
      }
    });
    one.append(asked, side);
    if (row.verdicts.length) {
      const said = make("ul", undefined, "said");
      for (const verdict of row.verdicts) said.append(make("li", verdict));
      one.append(said);
    }
    return one;
  };
  const draw = () => {
    const end = Math.min(start + PER_PAGE, found.length);
    list.replaceChildren(...found.slice(start, end).map(card));
    count.textContent = found.length ? `${start + 1} to ${end} of ${found.length}` : "nothing found";
    find("back").disabled = start === 0;
    find("next").disabled = end >= found.length;
  };
  const turn = (step) => {
    const next = start + step * PER_PAGE;
    if (next < 0 || next >= found.length) return false;
    start = next;
    draw();
    return true;
  };
  const move = (step) => {
    const cards = [...list.children];
    const next = cards.indexOf(document.activeElement) + step;
    if (next >= cards.length && turn(1)) list.firstChild.focus();
    else if (next < 0 && turn(-1)) list.lastChild.focus();
    else cards[Math.max(0, Math.min(cards.length - 1, next))]?.focus();
  };
  find("back").addEventListener("click", () => turn(-1));
  find("next").addEventListener("click", () => turn(1));
  for (const one of [search, group, differ]) one.addEventListener("input", choose);
  document.querySelector(".chooser").addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("input[type=search], select, textarea")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const act = {
      "/": () => search.focus(),
      j: () => move(1),
      k: () => move(-1),
      n: () => turn(1),
      p: () => turn(-1),
      d: () => {
        differ.checked = !differ.checked;
        choose();
      },
    }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });
  for (const one of document.querySelectorAll(".chooser, .pager, .keys")) one.hidden = false;
  draw();
})();

// What else moves: the film, the table, and a page that is watched.

// The film: each run shows its newest frame up to the step of the slider.

const slider = find("#step");
if (slider) {
  const frames = all("img[data-run]").map((image) => {
    const of_run = data.films[Number(image.dataset.run)];
    of_run[of_run.length - 1].source ??= image.src;
    return { image, of_run, caption: find("figcaption", image.parentElement) };
  });
  const show = () => {
    const step = data.film_steps[Number(slider.value)];
    const words = `step ${whole(step)}`;
    find("#film-step").textContent = words;
    slider.setAttribute("aria-valuetext", words);
    remember("film", slider.value === slider.max ? null : slider.value);
    for (const { image, of_run, caption } of frames) {
      const shown = of_run.findLast((frame) => frame.step <= step);
      image.style.visibility = shown ? "visible" : "hidden";
      caption.textContent = shown
        ? `samples of step ${whole(shown.step)}`
        : "no samples yet";
      if (shown) image.src = shown.source;
    }
  };
  let timer = 0;
  const play = find("#play");
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    play.textContent = "play";
  };
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (slider.value === slider.max) slider.value = "0";
    show();
    play.textContent = "stop";
    timer = setInterval(() => {
      slider.stepUp();
      show();
      if (slider.value === slider.max) stop();
    }, 150);
  });
  slider.addEventListener("input", () => {
    if (timer) stop();
    show();
  });
  // It has been moved before a reload.
  slider.value = memory.film || slider.max;
  show();
}

// The table: a click on the head of a column sorts by it, again the other way.

for (const table of all("table.sortable")) {
  all("thead th", table).forEach((head, column) => {
    find("button", head).addEventListener("click", () => {
      const isUp = head.getAttribute("aria-sort") === "ascending";
      for (const other of all("thead th", table))
        other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", isUp ? "descending" : "ascending");
      const sign = isUp ? -1 : 1;
      const body = find("tbody", table);
      const rows = all("tr", body).map((row) => {
        const text = row.children[column].dataset.value;
        return { row, text, number: text === "" ? NaN : Number(text) };
      });
      rows.sort((a, b) => {
        // What has no value stands last, both ways.
        if (!a.text || !b.text) return !a.text - !b.text;
        if (isNaN(a.number) || isNaN(b.number))
          return sign * a.text.localeCompare(b.text, "en", { numeric: true });
        return sign * (a.number - b.number);
      });
      body.append(...rows.map(({ row }) => row));
    });
  });
}

if (data.reload_secs) {
  const follow = find("#follow");
  follow.checked = memory.follow !== false;
  follow.addEventListener("change", () => remember("follow", follow.checked));
  setInterval(() => {
    if (follow.checked) location.reload();
  }, data.reload_secs * 1000);
}

{
  const comparison = JSON.parse(document.getElementById("comparison").textContent);
  const names = comparison.systems.map((system) => system.name);
  const part = (id) => document.getElementById(id);
  const selects = [part("one"), part("other")], sides = [part("left"), part("right")];
  const stored = `prefopt votes ${comparison.key}`;
  const order = location.hash.slice(1);
  let {ballot, votes} = load();
  let items = [], place = 0, revealed = false;

  // A number in [0, 1) that depends on the text alone: what is random here is the same at every visit.
  function chance(text) {
    let hash = 2166136261;
    for (let i = 0; i < text.length; i++) hash = Math.imul(hash ^ text.charCodeAt(i), 16777619);
    hash = Math.imul(hash ^ (hash >>> 16), 2246822507);
    hash = Math.imul(hash ^ (hash >>> 13), 3266489909);
    return ((hash ^ (hash >>> 16)) >>> 0) / 2 ** 32;
  }

  // The id tells this person's file from those of others who vote alike.
  function empty() {
    const bytes = crypto.getRandomValues(new Uint8Array(16));
    return {ballot: [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join(""), votes: new Map()};
  }

  // Storage may be switched off or full: the votes are then those of this visit.
  function load() {
    try {
      const kept = JSON.parse(localStorage.getItem(stored));
      return kept?.ballot ? {ballot: kept.ballot, votes: new Map(kept.votes)} : empty();
    } catch {
      return empty();
    }
  }

  function save() {
    const all = [...votes.values()];
    try {
      localStorage.setItem(stored, JSON.stringify({ballot, votes: [...votes]}));
      part("unsaved").hidden = true;
    } catch {
      part("unsaved").hidden = false;
    }
    const identities = Object.fromEntries(comparison.systems.map((system) => [system.name, system.identity]));
    const text = JSON.stringify({ballot, comparison: identities, votes: all}, null, 1);
    part("download").href = `data:application/json;charset=utf-8,${encodeURIComponent(text)}`;
    part("download").hidden = part("delete").hidden = !all.length;
    part("download").textContent = `Download votes.json (${all.length} vote${all.length === 1 ? "" : "s"})`;
  }

  // The pair's prompts and seeds in a random order, each with the systems' places on the left and right.
  function choose() {
    const pair = selects.map((select) => Number(select.value)).sort((a, b) => a - b);
    selects.forEach((select, i) => {
      for (const option of select.options) option.disabled = option.value === selects[1 - i].value;
    });
    items = comparison.rows
      .filter((row) => row.images[pair[0]] !== row.images[pair[1]])
      .map((row) => {
        const systems = pair.map((i) => names[i]);
        const key = JSON.stringify([...systems, row.prompt, row.seed]), text = `${comparison.key} ${order} ${key}`;
        const shown = chance(`side ${text}`) < 0.5 ? pair : [pair[1], pair[0]];
        return {key, systems, prompt: row.prompt, seed: row.seed, shown, images: shown.map((i) => row.images[i]), at: chance(text)};
      })
      .sort((a, b) => a.at - b.at);
    revealed = false;
    goOn();
  }

  function goOn() {
    place = items.findIndex((item) => !votes.has(item.key));
    if (place < 0) place = items.length;
    draw();
  }

  function draw() {
    const item = items[place], voted = items.filter((one) => votes.has(one.key)).length;
    part("ballot").hidden = !item;
    part("back").disabled = place === 0;
    part("progress").max = Math.max(1, items.length);
    part("progress").value = voted;
    part("count").textContent = items.length
      ? `${voted} of ${items.length} voted on` : "These two have the same images: choose another pair.";
    part("done").hidden = Boolean(item) || !items.length;
    if (item) {
      part("prompt").textContent = item.prompt;
      part("missing").hidden = true;
      sides.forEach((image, i) => { image.src = item.images[i]; });
      for (const image of items[place + 1]?.images ?? []) new Image().src = image;
      const vote = votes.get(item.key), now = vote && (vote.winner === null ? "tie" : names[item.shown[0]] === vote.winner ? "left" : "right");
      for (const button of document.querySelectorAll("[data-vote]")) button.setAttribute("aria-pressed", button.dataset.vote === now);
    }
    reveal();
  }

  // Names are shown on demand, and when every image is voted on.
  function reveal() {
    const cast = items.map((item) => votes.get(item.key)).filter(Boolean);
    const shown = cast.length > 0 && (revealed || cast.length === items.length);
    part("reveal").hidden = shown || !cast.length;
    part("result").hidden = !shown;
    if (!shown) return;
    const [one, other] = items[0].systems, count = (winner) => cast.filter((vote) => vote.winner === winner).length;
    const rate = 100 * (count(other) + count(null) / 2) / cast.length;
    part("result").textContent = `${other} preferred ${count(other)} times, ${one} ${count(one)} times, ties ${count(null)}: `
      + `${rate.toFixed(1)} % for ${other}, a tie counting one half.`;
  }

  function cast(choice) {
    const item = items[place];
    if (!item || !part("missing").hidden) return;
    const winner = choice === "tie" ? null : names[item.shown[choice === "left" ? 0 : 1]];
    votes.set(item.key, {systems: item.systems, prompt: item.prompt, seed: item.seed, winner});
    save();
    place += 1;
    while (place < items.length && votes.has(items[place].key)) place += 1;
    if (place === items.length) goOn(); else draw();
  }

  function back() {
    if (place > 0) place -= 1;
    draw();
  }

  for (const [i, select] of selects.entries()) {
    names.forEach((name, value) => select.add(new Option(name, value)));
    select.value = comparison.pair[i];
    select.addEventListener("change", choose);
  }
  for (const image of sides) {
    image.addEventListener("error", () => { part("missing").hidden = false; });
    image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth <= comparison.small));
  }
  for (const button of document.querySelectorAll("[data-vote]")) button.addEventListener("click", () => cast(button.dataset.vote));
  part("back").addEventListener("click", back);
  part("reveal").addEventListener("click", () => { revealed = true; reveal(); });
  part("delete").addEventListener("click", () => {
    if (!confirm("Delete all votes of this comparison?")) return;
    ({ballot, votes} = empty());
    save();
    choose();
  });
  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest?.("select, dialog[open]")) return;
    const choice = {ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie"}[event.key];
    if (choice) cast(choice);
    else if (event.key === "Backspace") back();
    else return;
    event.preventDefault();
  });
  part("vote").hidden = false;
  save();
  choose();
}

"use strict";
(() => {
  /** How often the server is asked, and how long it has to answer, in ms. */
  const PERIOD = 1000;
  const LIMIT = 5000;

  // The page is where the router is mounted, under whatever path the browser sees. Not relative: a
  // browser refuses to send what it has to complete by an address with a password in it.
  const mount = location.origin + location.pathname.replace(/\/+$/, "") + "/";
  const can_release = document.documentElement.dataset.release === "on";
  const get = (id) => document.getElementById(id);
  const table = get("locks");
  const body = table.tBodies[0];

  /** The rows by key. They are kept from answer to answer, so that whoever has the focus keeps it. */
  const rows = new Map();
  let snapshot = null;
  let seen_at = null;
  let paused = false;
  let timer;
  /** Counts the questions: only the last one's answer is shown. */
  let asked = 0;

  // ---- words

  function time(ms) {
    if (ms === null) return "–";
    if (ms < 1000) return `${ms} ms`;
    const s = Math.floor(ms / 1000);
    if (s < 60) return `${(Math.floor(ms / 100) / 10).toFixed(1)} s`;
    const two = (number) => String(number).padStart(2, "0");
    if (s < 3600) return `${Math.floor(s / 60)} min ${two(s % 60)} s`;
    return `${Math.floor(s / 3600)} h ${two(Math.floor(s / 60) % 60)} min`;
  }

  function count(number, one, many) {
    return `${number} ${number === 1 ? one : many}`;
  }

  function name(process) {
    if (process.label !== null) return process.label;
    return process.this ? "this process" : "a process without a label";
  }

  // ---- elements

  /** All text gets into the page here, as text. */
  function write(element, text) {
    if (element.textContent !== text) element.textContent = text;
    return element;
  }

  function make(tag, class_name, text) {
    const element = document.createElement(tag);
    if (class_name) element.className = class_name;
    if (text) element.textContent = text;
    return element;
  }

  function show_process(parent, process) {
    if (process.label === null && !process.answered && !process.this) {
      parent.append(make("span", "soft", "unknown"));
    } else if (process.label === null) {
      parent.append(make("span", "soft", "no label"));
    } else {
      // Isolated: a name that is written from right to left does not turn what is beside it.
      parent.append(make("bdi", "process", process.label));
    }
    if (process.this) parent.append(make("span", "tag", "this process"));
    else if (!process.answered) parent.append(make("span", "tag bad", "did not answer"));
  }

  function show_waiters(cell, waiters) {
    cell.replaceChildren();
    if (waiters.length === 0) {
      cell.append(make("span", "nobody", "nobody"));
      return;
    }
    const list = make("ol");
    for (const waiter of waiters) {
      const item = make("li");
      show_process(item, waiter);
      if (waiter.callers !== null) {
        item.append(" ", make("span", "soft", count(waiter.callers, "caller", "callers")));
      }
      list.append(item);
    }
    cell.append(list);
  }

  class Row {
    constructor(key) {
      this.element = make("tr");
      const head = make("th", "", key);
      head.scope = "row";
      this.element.append(head);
      const cell = (class_name) => this.element.appendChild(make("td", class_name));
      this.holder = cell("");
      this.held = cell("number");
      this.ttl = cell("number");
      this.token = cell("number");
      this.waiters = cell("");
      this.shown = {};
      if (can_release) {
        this.button = make("button", "danger", "Release…");
        this.button.type = "button";
        this.button.setAttribute("aria-label", `Release ${key} …`);
        this.button.addEventListener("click", () => open(this.lock));
        cell("action").append(this.button);
      }
    }

    show(lock) {
      this.lock = lock;
      write(this.held, time(lock.held_ms));
      write(this.ttl, lock.ttl_ms === null ? "never" : time(lock.ttl_ms));
      write(this.token, lock.fencing_token === null ? "–" : String(lock.fencing_token));
      this.once("holder", lock.holder, () => {
        this.holder.replaceChildren();
        show_process(this.holder, lock.holder);
      });
      this.once("waiters", lock.waiters, () => show_waiters(this.waiters, lock.waiters));
    }

    /** Leaves alone what is as it was, for those who are about to select or to hear it. */
    once(what, value, change) {
      const text = JSON.stringify(value);
      if (this.shown[what] === text) return;
      this.shown[what] = text;
      change();
    }
  }

  // ---- the table

  function show() {
    if (snapshot === null) return;
    const wanted = get("filter").value.trim().toLowerCase();
    const { locks, more } = snapshot;
    const shown = locks.filter((lock) => lock.key.toLowerCase().includes(wanted));

    const keys = new Set(shown.map((lock) => lock.key));
    for (const [key, row] of rows) {
      if (keys.has(key)) continue;
      const neighbour = row.element.nextElementSibling ?? row.element.previousElementSibling;
      const had_focus = row.element.contains(document.activeElement);
      row.element.remove();
      rows.delete(key);
      if (had_focus) (neighbour?.querySelector("button") ?? get("filter")).focus();
    }
    let place = body.firstElementChild;
    for (const lock of shown) {
      let row = rows.get(lock.key);
      if (row === undefined) {
        row = new Row(lock.key);
        rows.set(lock.key, row);
      }
      row.show(lock);
      if (row.element === place) place = place.nextElementSibling;
      else body.insertBefore(row.element, place);
    }

    const waiting = shown
      .flatMap((lock) => lock.waiters)
      .reduce((sum, waiter) => sum + (waiter.callers ?? 1), 0);
    const held = more ? `the first ${locks.length} locks` : count(locks.length, "lock", "locks");
    const part = wanted === "" ? held : `${shown.length} of ${held}`;
    write(get("count"), `${part}, ${count(waiting, "caller waits", "callers wait")}`);

    const empty = get("empty");
    empty.hidden = shown.length > 0;
    write(empty, locks.length === 0 ? "No lock is held." : "No held lock has this in its key.");
  }

  // ---- the server

  class Failure extends Error {}

  async function ask(path, options) {
    let response;
    let answer = null;
    try {
      response = await fetch(mount + path, {
        cache: "no-store",
        credentials: "same-origin",
        redirect: "manual",
        signal: AbortSignal.timeout(LIMIT),
        ...options,
      });
      answer = await response.json();
    } catch (error) {
      if (response === undefined || error.name === "TimeoutError") {
        throw new Failure("The server does not answer.");
      }
      if (response.ok) {
        throw new Failure("The server answers with something else: reload this page.");
      }
    }
    if (response.type === "opaqueredirect" || response.status === 401) {
      throw new Failure("The server wants you to log in again: reload this page.");
    }
    if (!response.ok) {
      const why = typeof answer?.error === "string" ? answer.error : "no reason was given";
      throw new Failure(`The server answers ${response.status}: ${why}.`);
    }
    return answer;
  }

  function state(which, text) {
    get("state").dataset.state = which;
    write(get("state"), text);
    document.body.classList.toggle("stale", which === "failing");
  }

  const clock = () => seen_at.toLocaleTimeString();

  async function look() {
    clearTimeout(timer);
    if (paused || document.hidden) return;
    asked += 1;
    const question = asked;
    let failure = null;
    let answer = null;
    try {
      answer = await ask("locks.json", {});
    } catch (error) {
      if (!(error instanceof Failure)) throw error;
      failure = error;
    }
    if (question !== asked) return;
    if (failure === null) {
      snapshot = answer;
      seen_at = new Date();
      show();
    }
    // Paused meanwhile: what has come is shown, and nothing more is asked.
    if (paused || document.hidden) return;
    if (failure === null) {
      state("live", `Live, ${clock()}`);
      write(get("problem"), "");
    } else {
      state("failing", "No news");
      const old = seen_at === null ? "" : ` The table shows ${clock()}.`;
      write(get("problem"), failure.message + old);
    }
    timer = setTimeout(look, PERIOD);
  }

  function go_or_pause() {
    write(get("pause"), paused ? "Resume" : "Pause");
    if (paused || document.hidden) {
      clearTimeout(timer);
      state("paused", seen_at === null ? "Paused" : `Paused, ${clock()}`);
    } else {
      look();
    }
  }

  // ---- taking a lock away

  /** The lock that the dialog is about, as it was when it was opened. */
  let meant = null;

  function open(lock) {
    meant = lock;
    write(get("dialog-key"), lock.key);
    const since = lock.held_ms === null ? "" : ` for ${time(lock.held_ms)}`;
    write(get("dialog-holder"), `Held by ${name(lock.holder)}${since}.`);
    write(get("dialog-problem"), "");
    get("reason").value = "";
    get("confirm").disabled = false;
    get("dialog").showModal();
    get("reason").focus();
  }

  async function release(event) {
    event.preventDefault();
    const lock = meant;
    const reason = get("reason").value.trim();
    if (reason === "") {
      write(get("dialog-problem"), "Say why, in a word: it is written to the log.");
      get("reason").focus();
      return;
    }
    get("confirm").disabled = true;
    write(get("dialog-problem"), "");
    try {
      const { key, fencing_token } = lock;
      const answer = await ask("release", {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ key, reason, fencing_token }),
      });
      const news = answer.released
        ? `${key} was taken from ${name(lock.holder)}.`
        : `${key} was free already: nothing was done.`;
      write(get("news"), news);
      if (meant === lock) get("dialog").close();
    } catch (error) {
      if (!(error instanceof Failure)) throw error;
      if (meant === lock) write(get("dialog-problem"), error.message);
    }
    get("confirm").disabled = false;
    look();
  }

  get("filter").addEventListener("input", show);
  get("pause").addEventListener("click", () => {
    paused = !paused;
    go_or_pause();
  });
  get("cancel").addEventListener("click", () => get("dialog").close());
  get("dialog").addEventListener("close", () => {
    meant = null;
  });
  get("form").addEventListener("submit", release);
  document.addEventListener("visibilitychange", go_or_pause);
  go_or_pause();
})();

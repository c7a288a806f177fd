/** Menus: commands, models, adapters and the length of a snooze. */

import * as vscode from "vscode";

import { type Configuration } from "./configuration.js";
import { type Programs } from "./programs.js";
import { type Session } from "./session.js";

/** A row of `midfill model list --json`. */
interface Model {
  name: string;
  installed: boolean;
  license?: string;
  parameters?: number;
  memory_mb?: number;
  /** Size of the download; null or undefined if it is not known. */
  download_mb?: number | null;
}

/** A row of `midfill adapter list --json`. */
interface Adapter {
  name: string;
  base: string;
  path: string;
}

/** Midfill's command line, from the installation of the server in use. */
export interface CommandLine {
  /** Program and arguments; undefined if there is none. */
  command: () => Promise<string[] | undefined>;
  programs: Programs;
}

export async function menu(session: Session): Promise<void> {
  const { state, snoozeEnd } = session;
  const language = vscode.window.activeTextEditor?.document.languageId;
  const isOn = !("status" in state) || state.status.enabled;
  const entries: [string, string, string][] = [];
  if (state.kind === "missing") {
    entries.push(["cloud-download", "Install server", "midfill.installServer"]);
  }
  if (state.kind === "failed" && state.status.modelMissing === true) {
    entries.push(["cloud-download", "Download the model", "midfill.downloadModel"]);
  }
  if (snoozeEnd !== undefined) {
    entries.push(["play", "End snooze", "midfill.toggle"]);
  } else {
    entries.push([
      "circle-slash",
      isOn ? "Switch suggestions off" : "Switch suggestions on",
      "midfill.toggle",
    ]);
    if (language !== undefined) {
      entries.push(["code", `Toggle suggestions for ${language}`, "midfill.toggleLanguage"]);
    }
    entries.push(["clock", "Snooze suggestions", "midfill.snooze"]);
  }
  entries.push(
    ["chip", "Choose model", "midfill.chooseModel"],
    ["extensions", "Choose adapter", "midfill.chooseAdapter"],
    ["question", "Explain last suggestion", "midfill.explainLast"],
    ["output", "Show log", "midfill.showLog"],
    ["debug-restart", "Restart server", "midfill.restart"],
    ["gear", "Settings", "midfill.openSettings"],
  );
  const items = entries.map(([icon, label, command]) => ({ label: `$(${icon}) ${label}`, command }));
  const chosen = await vscode.window.showQuickPick(items, { title: "midfill" });
  if (chosen !== undefined) {
    await vscode.commands.executeCommand(chosen.command);
  }
}

export async function toggle(session: Session, configuration: Configuration): Promise<void> {
  if (session.snoozeEnd !== undefined) {
    await session.pause(0);
    return;
  }
  const { state } = session;
  const isOn = "status" in state ? state.status.enabled : configuration.get("enabled", true);
  await configuration.set("enabled", !isOn);
}

export async function toggleLanguage(configuration: Configuration): Promise<void> {
  const language = vscode.window.activeTextEditor?.document.languageId;
  if (language !== undefined) {
    const off = configuration.get<string[]>("disabledLanguages", []);
    const after = off.includes(language) ? off.filter((one) => one !== language) : [...off, language];
    await configuration.set("disabledLanguages", after);
  }
}

export async function snooze(session: Session): Promise<void> {
  const items = [5, 15, 60].map((minutes) => ({ label: `${minutes} minutes`, minutes }));
  const chosen = await vscode.window.showQuickPick(items, { title: "midfill: snooze suggestions for" });
  if (chosen !== undefined) {
    await session.pause(chosen.minutes);
  }
}

export async function chooseModel(
  { command: find, programs }: CommandLine,
  configuration: Configuration,
  session: Session,
  log: vscode.LogOutputChannel,
): Promise<void> {
  const command = await find();
  if (command === undefined) {
    return;
  }
  const { models } = await ask<{ models: Model[] }>(programs, command, ["model", "list", "--json"]);
  const used = configuration.get("model", "");
  const items = models.map((model) => ({ ...describe(model, used), model }));
  const chosen = await vscode.window.showQuickPick(items, {
    title: "midfill: model",
    placeHolder: "A model that is not installed is downloaded first",
    matchOnDescription: true,
  });
  if (chosen === undefined) {
    return;
  }
  if (chosen.model.installed || (await pull(programs, command, chosen.model.name, session, log))) {
    await configuration.set("model", chosen.model.name);
  }
}

/** Asks whether to download a model that is not on this machine. Returns true if so. */
export async function offerModel(programs: Programs, command: string[], name: string): Promise<boolean> {
  const { models, cache } = await ask<{ models: Model[]; cache: string }>(programs, command, [
    "model",
    "list",
    "--json",
  ]);
  const size = models.find((model) => model.name === name)?.download_mb;
  const what = size == null ? name : `${name} (${(size / 1000).toFixed(1)} GB)`;
  const message = `midfill: The model ${what} is not on this machine. Download it into ${cache}?`;
  const chosen = await vscode.window.showInformationMessage(message, "Download", "Choose Another Model");
  if (chosen === "Choose Another Model") {
    await vscode.commands.executeCommand("midfill.chooseModel");
  }
  return chosen === "Download";
}

/** Downloads a model, with its progress and a Cancel button. Returns false if the user cancelled. */
export async function pull(
  programs: Programs,
  command: string[],
  name: string,
  session: Session,
  log: vscode.LogOutputChannel,
): Promise<boolean> {
  const options = {
    location: vscode.ProgressLocation.Notification,
    title: `Downloading ${name}`,
    cancellable: true,
  };
  session.work = `Downloading ${name}.`;
  try {
    return await vscode.window.withProgress(options, async (progress, token) => {
      let last = "";
      let done = 0;
      const told = (line: string) => {
        last = line;
        log.info(line);
        const percentage = Number(/\((\d+) %\)$/.exec(line)?.[1] ?? done);
        progress.report({ message: line, increment: Math.max(0, percentage - done) });
        done = Math.max(done, percentage);
        session.work = line;
      };
      const { status } = await programs.run([...command, "model", "pull", name], told, token);
      if (token.isCancellationRequested) {
        return false;
      }
      if (status !== 0) {
        throw new Error(last || `Could not download ${name}. See the log.`);
      }
      return true;
    });
  } finally {
    session.work = undefined;
  }
}

export async function chooseAdapter(
  { command: find, programs }: CommandLine,
  configuration: Configuration,
): Promise<void> {
  const command = await find();
  if (command === undefined) {
    return;
  }
  const { adapters } = await ask<{ adapters: Adapter[] }>(programs, command, ["adapter", "list", "--json"]);
  const chosen = await vscode.window.showQuickPick(
    [
      { label: "$(circle-slash) None", path: null },
      ...adapters.map(({ name, base, path }) => ({ label: name, description: base, path })),
      { label: "$(folder-opened) Choose a folder…", path: undefined },
    ],
    { title: "midfill: adapter" },
  );
  if (chosen === undefined) {
    return;
  }
  if (chosen.path !== undefined) {
    // Without a value here, the setting in midfill's own file applies.
    await configuration.set("adapter", chosen.path ?? undefined);
    return;
  }
  const folders = await vscode.window.showOpenDialog({
    title: "Choose the folder of a LoRA adapter (PEFT format)",
    canSelectFiles: false,
    canSelectFolders: true,
  });
  if (folders?.[0] !== undefined) {
    await configuration.set("adapter", folders[0].fsPath);
  }
}

/** Runs the command line and returns the JSON that it prints. */
async function ask<T>(programs: Programs, command: string[], args: string[]): Promise<T> {
  let last = "";
  const { status, output } = await programs.run([...command, ...args], (line) => {
    last = line;
  });
  if (status !== 0) {
    throw new Error(last || `midfill ${args.join(" ")} failed with status ${status ?? "unknown"}.`);
  }
  return JSON.parse(output) as T;
}

function describe(model: Model, used: string): vscode.QuickPickItem {
  const parameters =
    model.parameters === undefined ? [] : [`${(model.parameters / 1e9).toFixed(1)} B parameters`];
  const memory = model.memory_mb === undefined ? [] : [`${(model.memory_mb / 1000).toFixed(1)} GB`];
  const here = model.installed ? [] : ["not installed"];
  return {
    label: model.name === used ? `$(check) ${model.name}` : model.name,
    description: [
      ...parameters,
      ...memory,
      ...(model.license === undefined ? [] : [model.license]),
      ...here,
    ].join(", "),
  };
}

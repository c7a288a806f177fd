/** Runs the server: starts it, sends it the settings, watches it, and restarts it after a crash. */

import { type ChildProcess } from "node:child_process";
import * as vscode from "vscode";
import {
  CloseAction,
  ErrorAction,
  LanguageClient,
  type LanguageClientOptions,
  MessageType,
  ShowMessageNotification,
  type WorkDoneProgressBegin,
  type WorkDoneProgressEnd,
  type WorkDoneProgressReport,
} from "vscode-languageclient/node";

import { type Configuration, SECTION } from "./configuration.js";
import { type Programs } from "./programs.js";

// Pauses before the first and second restart; a third crash within WINDOW_MS is final.
const PAUSES_MS = [500, 4_000];
const WINDOW_MS = 180_000;
// Minimum interval between two requests for the status.
const REFRESH_MS = 1_000;
// Maximum time between the end of the server's output and the end of its process.
const END_MS = 1_000;

/** The answer of `midfill/status`. */
export interface ServerStatus {
  state: "loading" | "ready" | "failed";
  message: string | null;
  /** The model could not be loaded, because it has not been downloaded. Servers before 0.2 do not say it. */
  modelMissing?: boolean;
  /** Why the active file gets no suggestion anywhere; null if it does. */
  file?: { reason: string; message: string } | null;
  enabled: boolean;
  model: string;
  adapter: string | null;
  device: string | null;
  dtype: string | null;
  tokensPerSecond: number | null;
  version: string;
}

export type State =
  | { kind: "missing" }
  | { kind: "starting" }
  | { kind: "loading"; status: ServerStatus; percentage: number | undefined; step: string | undefined }
  | { kind: "ready"; status: ServerStatus }
  | { kind: "failed"; status: ServerStatus }
  | { kind: "stopped"; why: string };

/** The answer of `midfill/explain`. */
export interface Explanation {
  source: string;
  reason: string | null;
  message: string | null;
  [detail: string]: unknown;
}

type Progress = WorkDoneProgressBegin | WorkDoneProgressReport | WorkDoneProgressEnd;

/** A started server. `ended` resolves to the reason why it ended. */
interface Run {
  client: LanguageClient;
  child?: ChildProcess;
  /** There is no such program: to start it again would not help. */
  unstartable?: boolean;
  ended: Promise<string>;
}

/** Logs errors without showing them; `Session` shows what the user needs to know. */
class QuietClient extends LanguageClient {
  override error(message: string, data?: unknown): void {
    super.error(message, data, false);
  }
}

export class Session implements vscode.Disposable {
  private readonly changed = new vscode.EventEmitter<State>();
  private readonly showed = new vscode.EventEmitter<void>();
  /** Fired when `state` or `snoozeEnd` has changed. */
  readonly onDidChange = this.changed.event;
  /** Fired when there was something to show at the cursor. */
  readonly onDidSuggest = this.showed.event;

  private current: State = { kind: "starting" };
  private run: Run | undefined;
  private command: string[] = [];
  private served: string[] = [];
  private deaths: number[] = [];
  private restart: NodeJS.Timeout | undefined;
  private refresh: NodeJS.Timeout | undefined;
  private snooze: NodeJS.Timeout | undefined;
  private snoozedUntil: Date | undefined;
  private task: string | undefined;
  private turn = 0;

  constructor(
    private readonly configuration: Configuration,
    private readonly log: vscode.LogOutputChannel,
    private readonly programs: Programs,
  ) {}

  get state(): State {
    return this.current;
  }

  /** The end of the snooze, if there is one. */
  get snoozeEnd(): Date | undefined {
    return this.snoozedUntil;
  }

  /** What the extension is downloading or installing now, with its progress. */
  get work(): string | undefined {
    return this.task;
  }

  set work(task: string | undefined) {
    this.task = task;
    this.changed.fire(this.current);
  }

  /** Requests the status anew, for another file perhaps. */
  refreshStatus(): void {
    this.updateSoon(0);
  }

  /** Starts the server with this command, replaces a running one, and resets the count of crashes. */
  async start(command: string[]): Promise<void> {
    this.command = command;
    this.deaths = [];
    await this.launch();
  }

  /** Stops the server and sets the state. */
  async stop(state: State): Promise<void> {
    this.turn += 1;
    await this.end();
    this.become(state);
  }

  /** Restarts the server if there are now folders whose documents are not sent to it. */
  async foldersChanged(): Promise<void> {
    if (this.run !== undefined && schemes().some((scheme) => !this.served.includes(scheme))) {
      await this.launch();
    }
  }

  /** Sends the current settings to the server. */
  async configure(): Promise<void> {
    const settings = { [SECTION]: this.values() };
    try {
      await this.run?.client.sendNotification("workspace/didChangeConfiguration", { settings });
    } catch (error) {
      this.unheard(error);
    }
    this.updateSoon(0);
  }

  /** Snoozes suggestions; 0 ends the snooze. */
  async pause(minutes: number): Promise<void> {
    clearTimeout(this.snooze);
    this.snoozedUntil = undefined;
    if (minutes > 0) {
      this.snoozedUntil = new Date(Date.now() + minutes * 60_000);
      this.snooze = setTimeout(() => void this.pause(0), minutes * 60_000);
    }
    await this.configure();
  }

  /** Asks the server to explain its last answer for a document. */
  async explain(document: vscode.Uri, text: boolean): Promise<Explanation | undefined> {
    return this.run?.client.sendRequest<Explanation>("midfill/explain", {
      textDocument: { uri: document.toString() },
      text,
    });
  }

  dispose(): void {
    clearTimeout(this.snooze);
    void this.end();
    this.changed.dispose();
    this.showed.dispose();
  }

  private values(): Record<string, unknown> {
    const values = this.configuration.values();
    return this.snoozedUntil === undefined ? values : { ...values, enabled: false };
  }

  private become(state: State): void {
    this.current = state;
    this.changed.fire(state);
  }

  private async end(): Promise<void> {
    clearTimeout(this.restart);
    clearTimeout(this.refresh);
    this.refresh = undefined;
    const run = this.run;
    this.run = undefined;
    if (run !== undefined) {
      await release(run);
    }
  }

  private async launch(): Promise<void> {
    const turn = ++this.turn;
    await this.end();
    if (turn !== this.turn) {
      // A later start has begun in the meantime.
      return;
    }
    this.become({ kind: "starting" });
    const run = this.prepare();
    this.run = run;
    try {
      await run.client.start();
      await this.update();
    } catch (error) {
      await this.died(run, error);
    }
  }

  private prepare(): Run {
    const command = [...this.command, "serve", ...this.configuration.get<string[]>("server.arguments", [])];
    let tell: (why: string) => void;
    const ended = new Promise<string>((resolve) => {
      tell = resolve;
    });
    const start = async (): Promise<ChildProcess> => {
      this.log.info(command.join(" "));
      try {
        const child = await this.programs.start(command);
        run.child = child;
        child.on("exit", (status, signal) => {
          tell(signal === null ? `status ${status ?? "unknown"}` : `signal ${signal}`);
        });
        return child;
      } catch (error) {
        run.unstartable = true;
        tell(error instanceof Error ? error.message : String(error));
        throw error;
      }
    };
    const options = this.options(() => this.died(run));
    const run: Run = { client: new QuietClient("midfill", "midfill", start, options), ended };
    run.client.onNotification(ShowMessageNotification.type, ({ type, message }) => {
      void this.show(type, message);
    });
    return run;
  }

  private options(closed: () => Promise<void>): LanguageClientOptions {
    this.served = schemes();
    return {
      documentSelector: this.served.map((scheme) => ({ scheme })),
      initializationOptions: this.values(),
      outputChannel: this.log,
      initializationFailedHandler: () => false,
      errorHandler: {
        error: () => ({ action: ErrorAction.Continue, handled: true }),
        closed: () => {
          void closed();
          return { action: CloseAction.DoNotRestart, handled: true };
        },
      },
      middleware: {
        handleWorkDoneProgress: (_token, params) => {
          this.progressed(params);
        },
        provideInlineCompletionItems: async (document, position, context, token, next) => {
          const items = await next(document, position, context, token);
          this.updateSoon(REFRESH_MS);
          if (items && (Array.isArray(items) ? items : items.items).length > 0) {
            this.showed.fire();
          }
          return items;
        },
        provideCompletionItem: (document, position, context, token, next) =>
          this.configuration.get<boolean>("popup", false)
            ? next(document, position, context, token)
            : undefined,
      },
    };
  }

  /** Requests the status of the server. */
  private async update(): Promise<void> {
    const client = this.run?.client;
    if (client === undefined) {
      return;
    }
    const uri = vscode.window.activeTextEditor?.document.uri.toString();
    const params = uri === undefined ? {} : { textDocument: { uri } };
    const status = await client.sendRequest<ServerStatus>("midfill/status", params);
    if (client === this.run?.client) {
      const before = this.current;
      const progress = before.kind === "loading" ? before : { percentage: undefined, step: undefined };
      this.become(
        status.state === "loading"
          ? { kind: "loading", status, percentage: progress.percentage, step: progress.step }
          : { kind: status.state, status },
      );
    }
  }

  private updateSoon(pauseMs: number): void {
    if (pauseMs === 0) {
      clearTimeout(this.refresh);
      this.refresh = undefined;
    }
    this.refresh ??= setTimeout(() => {
      this.refresh = undefined;
      this.update().catch((error: unknown) => {
        this.unheard(error);
      });
    }, pauseMs);
  }

  /** Logs that the server did not receive a message. It gets all settings when it is restarted. */
  private unheard(error: unknown): void {
    this.log.debug(`the server did not receive a message: ${String(error)}`);
  }

  private progressed(progress: Progress): void {
    if (this.current.kind === "loading" && progress.kind !== "end") {
      this.become({
        ...this.current,
        percentage: progress.percentage ?? this.current.percentage,
        step: progress.message ?? this.current.step,
      });
    } else {
      this.updateSoon(0);
    }
  }

  private async died(run: Run, error?: unknown): Promise<void> {
    if (run !== this.run) {
      // It was stopped on purpose, or its end is known already.
      return;
    }
    this.run = undefined;
    const otherwise = error instanceof Error ? error.message : "its output was closed";
    const why = await Promise.race([run.ended, after(END_MS, otherwise)]);
    await release(run);
    this.log.error(`the server ended: ${why}`);
    if (run.unstartable === true) {
      this.become({ kind: "stopped", why });
      await this.askForAnother(why);
      return;
    }
    const now = Date.now();
    this.deaths = [...this.deaths.filter((death) => now - death < WINDOW_MS), now];
    const pause = PAUSES_MS[this.deaths.length - 1];
    if (pause === undefined) {
      this.become({ kind: "stopped", why });
      await this.giveUp(why);
    } else {
      this.become({ kind: "starting" });
      this.restart = setTimeout(() => void this.launch(), pause);
    }
  }

  private async askForAnother(why: string): Promise<void> {
    const message = `midfill: The server cannot be started (${why}). Check the setting midfill.server.command.`;
    const chosen = await vscode.window.showErrorMessage(message, "Settings", "Show Log");
    if (chosen === "Settings") {
      await vscode.commands.executeCommand("workbench.action.openSettings", "midfill.server.command");
    } else if (chosen === "Show Log") {
      this.log.show();
    }
  }

  private async giveUp(why: string): Promise<void> {
    const times = this.deaths.length;
    const message = `midfill: The server crashed ${times} times within three minutes (${why}) and stays off.`;
    const chosen = await vscode.window.showErrorMessage(message, "Restart", "Show Log");
    if (chosen === "Restart") {
      await vscode.commands.executeCommand("midfill.restart");
    } else if (chosen === "Show Log") {
      this.log.show();
    }
  }

  private async show(type: MessageType, message: string): Promise<void> {
    if (type !== MessageType.Error && type !== MessageType.Warning) {
      await vscode.window.showInformationMessage(message);
      return;
    }
    if (type === MessageType.Error) {
      // The extension asks for the download of a missing model itself; the message names a command for terminals.
      await this.update().catch((error: unknown) => {
        this.unheard(error);
      });
      const { current } = this;
      if (current.kind === "failed" && current.status.modelMissing === true) {
        this.log.info(message);
        return;
      }
    }
    const show =
      type === MessageType.Error ? vscode.window.showErrorMessage : vscode.window.showWarningMessage;
    if ((await show(message, "Show Log")) === "Show Log") {
      this.log.show();
    }
  }
}

/**
 * Returns the URI schemes of documents that are sent to the server: files, unsaved documents, notebook cells,
 * and files of virtual workspaces (which the server cannot read itself). Other schemes are the editor's own, such
 * as diffs, output and input fields.
 */
function schemes(): string[] {
  const folders = (vscode.workspace.workspaceFolders ?? []).map(({ uri }) => uri.scheme);
  return [...new Set(["file", "untitled", "vscode-notebook-cell", ...folders])];
}

/** Ends a server, even if it does not answer or has not started completely. */
async function release({ client, child, ended }: Run): Promise<void> {
  await client.dispose().catch(() => child?.kill());
  const isAlive = (await Promise.race([ended, after(END_MS, undefined)])) === undefined;
  if (isAlive) {
    child?.kill("SIGKILL");
  }
}

function after<T>(milliseconds: number, value: T): Promise<T> {
  return new Promise((resolve) => {
    setTimeout(resolve, milliseconds, value);
  });
}

/** Finds the server, or installs it in an environment in the extension's own folder. */

import { createHash } from "node:crypto";
import { promises as fs } from "node:fs";
import * as path from "node:path";
import * as vscode from "vscode";

import { find, ISOLATED, type Programs, WINDOWS } from "./programs.js";
import { type Session } from "./session.js";

const PYTHONS = [
  ...[14, 13, 12, 11].map((minor) => [`python3.${minor}`]),
  ["python3"],
  ["python"],
  ...(WINDOWS ? [["py", "-3"]] : []),
];
// In megabytes.
const UNITS: Record<string, number> = { kB: 0.001, MB: 1, GB: 1000 };
const OLDEST = "3.11";
// Prints the version if it is new enough and can create environments.
const PROBE =
  "import sys, venv, ensurepip; sys.version_info >= (3, 11) or sys.exit(1); print(sys.version.split()[0])";

export interface Server {
  /** Program and arguments of midfill's command line. */
  command: string[];
  /** True for the environment that the extension has created. */
  own: boolean;
}

export class Installation {
  /** Where the server is installed. */
  readonly folder: string;
  private readonly program: string;
  private readonly mark: string;

  constructor(
    private readonly extension: vscode.ExtensionContext,
    private readonly programs: Programs,
    private readonly session: Session,
    private readonly log: vscode.LogOutputChannel,
  ) {
    this.folder = path.join(extension.globalStorageUri.fsPath, "server");
    this.program = path.join(this.folder, ...(WINDOWS ? ["Scripts", "midfill.exe"] : ["bin", "midfill"]));
    this.mark = path.join(this.folder, "installed");
  }

  /** Returns the server of the setting, or the one on the PATH, or the extension's own, in this order. */
  async find(named: string[]): Promise<Server | undefined> {
    if (named.length > 0) {
      return { command: named, own: false };
    }
    const onPath = await find("midfill");
    if (onPath !== undefined) {
      return { command: [onPath], own: false };
    }
    return (await this.installed()) === undefined ? undefined : { command: [this.program], own: true };
  }

  /** Returns true if the installed server is not the one that this version of the extension contains. */
  async isOutdated(): Promise<boolean> {
    return (await this.installed()) !== (await this.bundled()).digest;
  }

  /** Creates or updates the environment. Returns false if the user cancelled; throws if it failed. */
  async install(): Promise<boolean> {
    const python = await this.findPython();
    if (python === undefined) {
      throw new Error(
        `No Python ${OLDEST} or newer was found that can create environments. Install Python` +
          (process.platform === "linux" ? " with its venv module (python3-venv)" : "") +
          ", or set midfill.server.command to an installed server.",
      );
    }
    const options = {
      location: vscode.ProgressLocation.Notification,
      title: "Installing the midfill server",
      cancellable: true,
    };
    this.session.work = "Installing the server.";
    try {
      return await vscode.window.withProgress(options, (progress, token) =>
        this.fill(python, progress, token),
      );
    } finally {
      this.session.work = undefined;
    }
  }

  private async fill(
    python: string[],
    progress: vscode.Progress<{ message: string }>,
    token: vscode.CancellationToken,
  ): Promise<boolean> {
    const bundled = await this.bundled();
    await fs.mkdir(path.dirname(this.folder), { recursive: true });
    // An environment without the mark is incomplete: it is not used, and created again.
    await fs.rm(this.mark, { force: true });
    let megabytes = 0;
    const report = (message: string) => {
      progress.report({ message });
      this.session.work = `Installing the server: ${message}.`;
    };
    const isCancelled = () => token.isCancellationRequested;
    const step = async (message: string, command: string[]) => {
      if (isCancelled()) {
        return;
      }
      report(message);
      this.log.info(command.join(" "));
      const errors: string[] = [];
      const told = (line: string) => {
        this.log.info(line);
        if (line.startsWith("ERROR:")) {
          errors.push(line);
        }
        const found = /^\s*Downloading ([A-Za-z0-9._]+).*\(([\d.]+) (kB|MB|GB)\)/.exec(line);
        if (found !== null) {
          const [, name = "", size = "0", unit = "MB"] = found;
          megabytes += Number(size) * (UNITS[unit] ?? 1);
          report(`${name} (${size} ${unit}), ${megabytes.toFixed(0)} MB in all`);
        } else if (/^\s*Installing collected packages/.test(line)) {
          report(`unpacking ${megabytes.toFixed(0)} MB`);
        }
      };
      const { status } = await this.programs.run(command, told, token);
      if (status !== 0 && !isCancelled()) {
        throw new Error(`The installation failed. ${errors.at(-1) ?? "See the log."}`);
      }
    };
    await step("creating the environment", [...python, ISOLATED, "-m", "venv", "--clear", this.folder]);
    const pip = path.join(path.dirname(this.program), WINDOWS ? "python.exe" : "python");
    const quietly = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"];
    // Installing a wheel runs no code of its author; building a source package would.
    const options = [...quietly, "--only-binary", ":all:"];
    await step("downloading packages", [pip, ISOLATED, "-m", "pip", "install", ...options, bundled.wheel]);
    if (isCancelled()) {
      return false;
    }
    await fs.writeFile(this.mark, bundled.digest);
    return true;
  }

  private async installed(): Promise<string | undefined> {
    return fs.readFile(this.mark, "utf8").catch(() => undefined);
  }

  /** Returns the wheel of the server that the extension contains, and its SHA-256. */
  private async bundled(): Promise<{ wheel: string; digest: string }> {
    const folder = this.extension.asAbsolutePath("server");
    const name = (await fs.readdir(folder)).find((entry) => entry.endsWith(".whl"));
    if (name === undefined) {
      throw new Error(
        `The extension is damaged: there is no server in ${folder}. Install the extension again.`,
      );
    }
    const wheel = path.join(folder, name);
    return {
      wheel,
      digest: createHash("sha256")
        .update(await fs.readFile(wheel))
        .digest("hex"),
    };
  }

  private async findPython(): Promise<string[] | undefined> {
    for (const [name = "", ...args] of PYTHONS) {
      const python = [name, ...args];
      // An error means that there is no such program, or that it is not a suitable Python.
      const ended = await this.programs.run([...python, ISOLATED, "-c", PROBE]).catch(() => undefined);
      if (ended?.status === 0) {
        return python;
      }
    }
    return undefined;
  }
}

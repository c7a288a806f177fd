/**
 * Finds and starts programs. Every process of the extension is started here.
 *
 * The extension host may run in the folder that the user has opened, and that folder may be untrusted. So no
 * program is found there (Windows searches the current folder first, as does a PATH with "."), and no Python
 * module is imported from there (`-c` and `-m` search it first).
 */

import { type ChildProcessWithoutNullStreams, spawn } from "node:child_process";
import { constants, promises as fs } from "node:fs";
import * as path from "node:path";
import type { CancellationToken } from "vscode";

export const WINDOWS = process.platform === "win32";
/** Option of Python: import neither from the current folder nor from the user's site-packages. */
export const ISOLATED = "-I";

/** The exit status and the output of a program. */
export interface Ended {
  status: number | null;
  output: string;
}

export class Programs {
  /** @param folder the extension's own folder, in which programs are started. */
  constructor(private readonly folder: string) {}

  /** Starts a program. Throws if there is no such program, or it cannot be started. */
  async start([name = "", ...args]: string[]): Promise<ChildProcessWithoutNullStreams> {
    const program = await find(name);
    if (program === undefined) {
      throw new Error(`Cannot run "${name}": it is neither an absolute path nor a program on the PATH.`);
    }
    await fs.mkdir(this.folder, { recursive: true });
    const child = spawn(program, args, {
      cwd: this.folder,
      // Keeps Python from importing from the current folder, whatever its arguments are.
      env: { ...process.env, PYTHONSAFEPATH: "1" },
      windowsHide: true,
    });
    return new Promise((resolve, reject) => {
      child.on("error", reject);
      child.once("spawn", () => {
        resolve(child);
      });
    });
  }

  /**
   * Runs a program and waits for its end.
   *
   * @param told called with each line of output.
   */
  async run(command: string[], told?: (line: string) => void, token?: CancellationToken): Promise<Ended> {
    const child = await this.start(command);
    child.stdin.end();
    const cancel = token?.onCancellationRequested(() => child.kill());
    let output = "";
    let unfinished = "";
    child.stdout.setEncoding("utf8").on("data", (text: string) => {
      output += text;
    });
    for (const stream of [child.stdout, child.stderr]) {
      stream.on("data", (data: Buffer | string) => {
        const lines = (unfinished + data.toString()).split(/\r?\n/);
        unfinished = lines.pop() ?? "";
        lines.filter((line) => line.trim()).forEach((line) => told?.(line));
      });
    }
    const status = await new Promise<number | null>((resolve) => {
      child.on("close", resolve);
    });
    cancel?.dispose();
    if (unfinished.trim()) {
      told?.(unfinished);
    }
    return { status, output };
  }
}

/**
 * Returns the absolute path of a program; undefined if no absolute folder of the PATH contains it.
 *
 * Relative paths are never found: they would depend on the folder that is open.
 */
export async function find(name: string): Promise<string | undefined> {
  if (isAbsolute(name)) {
    return name;
  }
  if (name === "" || path.basename(name) !== name) {
    return undefined;
  }
  const file = WINDOWS && !/\.(exe|com)$/i.test(name) ? `${name}.exe` : name;
  for (const entry of (process.env["PATH"] ?? "").split(path.delimiter)) {
    const folder = entry.replace(/^"(.*)"$/, "$1");
    if (isAbsolute(folder) && (await isProgram(path.join(folder, file)))) {
      return path.join(folder, file);
    }
  }
  return undefined;
}

/** On Windows, a path without a drive is relative to the current drive. */
function isAbsolute(file: string): boolean {
  return path.isAbsolute(file) && (!WINDOWS || path.parse(file).root.length > 1);
}

async function isProgram(file: string): Promise<boolean> {
  try {
    await fs.access(file, constants.X_OK);
    return (await fs.stat(file)).isFile();
  } catch {
    return false;
  }
}

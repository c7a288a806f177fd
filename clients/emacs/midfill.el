;;; midfill.el --- Code completion on your own machine, as ghost text  -*- lexical-binding: t -*-

;; Copyright the midfill authors
;; SPDX-License-Identifier: Apache-2.0

;; Author: The midfill authors
;; Version: 0.1.0
;; Package-Requires: ((emacs "28.1"))
;; Keywords: convenience, languages, tools

;;; Commentary:

;; midfill is a language server for code completion by fill-in-the-middle.  Your code stays on this
;; machine.  `midfill-mode' shows its suggestions as ghost text:
;;
;;     (add-to-list 'load-path "/path/to/midfill/clients/emacs")
;;     (require 'midfill)
;;     (global-midfill-mode)
;;
;; TAB accepts a suggestion, C-<right> its next word, M-<right> the rest of its line, C-g dismisses it.
;; These keys are bound only while a suggestion is shown.  C-c \ requests one.
;;
;; By default the server is a separate process, beside Eglot or lsp-mode; see `midfill-client' for the
;; alternatives.
;;
;; How it works: a suggestion belongs to the position at which it was requested.  While the text typed
;; since then is a beginning of it, and nothing else has changed, its rest is shown, without a request.
;; This is decided in `post-command-hook', before Emacs draws, so that nothing flickers.  There is one
;; suggestion at a time in all of Emacs.

;;; Code:

(require 'cl-lib)
(require 'seq)
(require 'midfill-server)

(defcustom midfill-auto t
  "Non-nil means to show suggestions while typing."
  :type 'boolean
  :group 'midfill)

(defcustom midfill-debounce 0.015
  "Seconds without a key before a suggestion is requested."
  :type 'number
  :group 'midfill)

(defcustom midfill-hide-during-completion t
  "Non-nil means to hide ghost text while a completion popup is open."
  :type 'boolean
  :group 'midfill)

(defcustom midfill-popup nil
  "Non-nil means to offer suggestions in `completion-at-point', too.
They are requested if no other completion function has anything.  With
Eglot or lsp-mode as `midfill-client', those offer them instead."
  :type 'boolean
  :group 'midfill)

(defcustom midfill-silent-commands '(undo undo-only undo-redo undo-tree-undo undo-tree-redo evil-undo)
  "Commands that change text without triggering a suggestion."
  :type '(repeat function)
  :group 'midfill)

(defcustom midfill-inhibit-functions nil
  "Functions without arguments that prevent ghost text by returning non-nil.
They are called in the buffer after each command."
  :type 'hook
  :group 'midfill)

(defface midfill-suggestion '((t :inherit shadow))
  "Ghost text."
  :group 'midfill)

(cl-defstruct (midfill--place (:constructor midfill--make-place) (:copier nil))
  "The position of point, and the text around it."
  buffer point tail size tick)

(cl-defstruct (midfill--suggestion (:constructor midfill--make-suggestion) (:copier nil))
  "The text that may stand at a place.
REPLACED is the number of closers after point that it takes the place of.
PAIRS has a cons for each closer of TEXT that Emacs may insert by itself:
the offset of its opener, -1 if that is before TEXT, and its own.
COMMAND tells the server at CONNECTION that it was accepted."
  place text replaced pairs command connection)

(cl-defstruct (midfill--question (:constructor midfill--make-question) (:copier nil))
  "A pending request."
  place connection id)

(defvar midfill--shown nil
  "The suggestion on the screen.")

(defvar midfill--pending nil
  "The pending request.")

(defvar midfill--timer nil
  "Timer of the next request.")

(defvar midfill--overlay nil
  "Draws the suggestion.")

(defvar midfill--seen nil
  "The place after the last command, in buffers that are served.")

(defvar-local midfill--tick nil
  "State of the buffer's text after the last command there.")

(defvar midfill--enabled t
  "Non-nil if suggestions are switched on.")

(defvar-local midfill--is-visible nil
  "Non-nil if the keys of `midfill-suggestion-map' are active.")

(defvar midfill-suggestion-map
  (let ((map (make-sparse-keymap)))
    (define-key map (kbd "TAB") #'midfill-accept)
    (define-key map (kbd "<tab>") #'midfill-accept)
    (define-key map (kbd "C-<right>") #'midfill-accept-word)
    (define-key map (kbd "M-<right>") #'midfill-accept-line)
    (define-key map (kbd "C-g") #'midfill-dismiss)
    map)
  "Keys that work while a suggestion is shown.")

(defvar midfill-mode-map
  (let ((map (make-sparse-keymap)))
    (define-key map (kbd "C-c \\") #'midfill-suggest)
    map)
  "Keys of `midfill-mode'.")

(defvar midfill--keys `((midfill--is-visible . ,midfill-suggestion-map))
  "Keymaps that take precedence while a suggestion is shown.")

;;; Places

(defun midfill--tail ()
  "What stands behind point in its line."
  (buffer-substring-no-properties (point) (line-end-position)))

(defun midfill--here ()
  "Return the place of point."
  (midfill--make-place :buffer (current-buffer) :point (point) :tail (midfill--tail)
                       :size (buffer-size) :tick (buffer-chars-modified-tick)))

(defun midfill--is-here (place)
  "Return non-nil if PLACE is at point, in the same text."
  (and place
       (eq (midfill--place-buffer place) (current-buffer))
       (= (midfill--place-tick place) (buffer-chars-modified-tick))
       (= (midfill--place-point place) (point))))

(defun midfill--are-closers (text)
  "Return non-nil if TEXT is nothing but closers."
  (string-match-p "\\`[])}>\"'`]*\\'" text))

(defun midfill--matched (added awaited text)
  "Return the offsets in AWAITED at which TEXT has the closers ADDED, in order.
Emacs may have closed some of what was typed, and other brackets not.
One after TEXT stays where it is and is left out.  t if ADDED has others."
  (catch 'other
    (let (offsets)
      (seq-doseq (char added)
        (while (and awaited
                    (not (if (< (car awaited) (length text))
                             (eq char (aref text (car awaited)))
                           (midfill--are-closers (string char)))))
          (pop awaited))
        (unless awaited
          (throw 'other t))
        (let ((at (pop awaited)))
          (when (< at (length text))
            (push at offsets))))
      (nreverse offsets))))

(defun midfill--rest (suggestion)
  "What of SUGGESTION is left at point; nil if it does not hold there.
A cons of the text and of the offsets in it of closers after point."
  (when-let* ((place (and suggestion (midfill--suggestion-place suggestion)))
              (start (midfill--place-point place))
              (text (midfill--suggestion-text suggestion)))
    (when (and (eq (midfill--place-buffer place) (current-buffer))
               (<= (point-min) start (point))
               (< (- (point) start) (length text)))
      (let* ((typed (buffer-substring-no-properties start (point)))
             (size (length typed))
             (pairs (seq-filter (lambda (pair) (and (< (car pair) size) (<= size (cdr pair))))
                                (midfill--suggestion-pairs suggestion)))
             (given (mapcar #'cdr (seq-filter (lambda (pair) (< (car pair) 0)) pairs)))
             (awaited (mapcar #'cdr (seq-remove (lambda (pair) (< (car pair) 0)) pairs)))
             (used (max 0 (- (midfill--suggestion-replaced suggestion) (length given))))
             (behind (substring (midfill--place-tail place) used))
             (tail (midfill--tail))
             ;; What was typed, over closers or not, and what the editor has closed at that, is all that
             ;; may have changed.
             (num-new (- (length tail) (length behind))))
        (when (and (>= num-new 0)
                   (string-prefix-p typed text)
                   (string-suffix-p behind tail)
                   (= (- (buffer-size) (midfill--place-size place)) (+ (- size used) num-new)))
          (let ((offsets (midfill--matched (substring tail 0 num-new) awaited text)))
            (when (listp offsets)
              (cons (substring text size)
                    (mapcar (lambda (at) (- at size)) (append offsets given))))))))))

(defun midfill--piece (text part)
  "Return the first word of TEXT, or the rest of its first line, or all of it.
PART is `word', `line' or nil.  An empty first line includes the next."
  (if (and part
           (string-match (if (eq part 'word)
                             "\\`[ \t\n]*\\(?:[[:word:]_]+\\|[^[:word:]_ \t\n]+\\)"
                           "\\`\n?[^\n]*")
                         text))
      (match-string 0 text)
    text))

(defun midfill--is-inserting ()
  "Return non-nil if keys insert text: not in Evil's normal state."
  (cond
   ((bound-and-true-p evil-local-mode) (memq (bound-and-true-p evil-state) '(insert emacs)))
   ((bound-and-true-p viper-mode)
    (memq (bound-and-true-p viper-current-state) '(insert-state emacs-state)))
   (t t)))

(defun midfill--can-show ()
  "Return non-nil if ghost text may be shown at point now."
  (and midfill--enabled
       (bound-and-true-p midfill-mode)
       (eq (window-buffer) (current-buffer))
       (not (use-region-p))
       (not buffer-read-only)
       (not executing-kbd-macro)
       (not (bound-and-true-p isearch-mode))
       (not (and midfill-hide-during-completion
                 (or (bound-and-true-p completion-in-region-mode)
                     (bound-and-true-p completion-preview-active-mode)
                     (bound-and-true-p company-candidates))))
       (midfill--is-inserting)
       (not (run-hook-with-args-until-success 'midfill-inhibit-functions))))

;;; Showing

(defun midfill--draw (rest)
  "Show REST, a text and the closers after point in it, as ghost text at point."
  (let ((shown (propertize (car rest) 'face 'midfill-suggestion))
        (end (+ (point) (length (cdr rest)))))
    ;; The cursor stands before the text, not behind it.
    (put-text-property 0 1 'cursor t shown)
    (unless (overlayp midfill--overlay)
      (setq midfill--overlay (make-overlay (point) (point)))
      (overlay-put midfill--overlay 'priority 1000))
    (move-overlay midfill--overlay (point) end (current-buffer))
    (overlay-put midfill--overlay 'window (selected-window))
    ;; The closers are hidden: they are in the text.
    (overlay-put midfill--overlay 'display (and (< (point) end) shown))
    (overlay-put midfill--overlay 'after-string (and (= (point) end) shown))
    (setq midfill--is-visible t)))

(defun midfill--cancel ()
  "Cancel the pending request."
  (when midfill--timer
    (cancel-timer midfill--timer)
    (setq midfill--timer nil))
  (when-let ((question midfill--pending))
    (setq midfill--pending nil)
    (when (midfill--question-id question)
      (midfill-server-cancel (midfill--question-connection question)
                             (midfill--question-id question)))))

(defun midfill--clear ()
  "Hide the suggestion and cancel the pending request."
  (setq midfill--shown nil)
  (when (and (overlayp midfill--overlay) (overlay-buffer midfill--overlay))
    (with-current-buffer (overlay-buffer midfill--overlay)
      (setq midfill--is-visible nil))
    (delete-overlay midfill--overlay))
  ;; Last: the connection may just be lost.
  (midfill--cancel))

;;; Asking

(defun midfill--num-replaced (range)
  "The number of closers after point that RANGE covers; nil if it covers others."
  (let ((begin (midfill-server-get range :start))
        (end (midfill-server-get range :end)))
    (cond
     ((null range) 0)
     ((not (equal (midfill-server-get begin :line) (midfill-server-get end :line))) nil)
     (t
      ;; Behind point a closer is one unit in every encoding.
      (let ((length (- (midfill-server-get end :character) (midfill-server-get begin :character)))
            (tail (midfill--tail)))
        (and (<= 0 length (length tail))
             (midfill--are-closers (substring tail 0 length))
             length))))))

(defun midfill--suggestion-of (item place connection)
  "The suggestion of the inline completion ITEM at PLACE.
ITEM came from CONNECTION.  nil if it would replace anything but what the
editor has closed by itself: ghost text can only add."
  (let* ((text (midfill-server-get item :insertText))
         (text (if (stringp text) text (midfill-server-get text :value)))
         (replaced (midfill--num-replaced (midfill-server-get item :range)))
         (pairs (mapcar (lambda (pair) (cons (elt pair 0) (elt pair 1)))
                        (midfill-server-get item :data :closers))))
    (when (and (stringp text) (not (string-empty-p text)) replaced)
      (let ((suggestion
             (midfill--make-suggestion
              :place place :text (replace-regexp-in-string "\r\n" "\n" text t t) :replaced replaced
              :pairs pairs :command (midfill-server-get item :command) :connection connection)))
        (and (midfill--rest suggestion) suggestion)))))

(defun midfill--answered (question result)
  "Show RESULT, the answer to QUESTION, unless it is outdated."
  (when (eq question midfill--pending)
    (setq midfill--pending nil)
    (let* ((place (midfill--question-place question))
           (buffer (midfill--place-buffer place))
           (items (if (vectorp result) result (midfill-server-get result :items)))
           (item (midfill-server-get items 0)))
      (when (and item (eq buffer (window-buffer)))
        (with-current-buffer buffer
          (when (and (midfill--is-here place) (midfill--can-show))
            (setq midfill--shown
                  (midfill--suggestion-of item place (midfill--question-connection question)))
            (when midfill--shown
              (midfill--draw (midfill--rest midfill--shown)))))))))

(defun midfill--ask (kind)
  "Request a suggestion at point.
KIND is 1 if the user requested it, 2 if it is automatic."
  (midfill--clear)
  (when-let ((connection (midfill-server-connection)))
    (midfill-server-flush connection)
    (let ((question (midfill--make-question :place (midfill--here) :connection connection)))
      (setq midfill--pending question)
      (setf (midfill--question-id question)
            (midfill-server-request
             connection :textDocument/inlineCompletion
             (append (midfill-server-position-params) (list :context (list :triggerKind kind)))
             (lambda (result) (midfill--answered question result)))))))

(defun midfill--ask-soon ()
  "Request a suggestion after `midfill-debounce'."
  (let ((place midfill--seen))
    (setq midfill--timer
          (run-with-timer
           midfill-debounce nil
           (lambda ()
             (setq midfill--timer nil)
             (when (and (eq place midfill--seen) (eq (midfill--place-buffer place) (window-buffer)))
               (with-current-buffer (midfill--place-buffer place)
                 (when (and (midfill--is-here place) (midfill--can-show))
                   (midfill--ask 2)))))))))

(defun midfill--after-command ()
  "Continue the suggestion, or request another one."
  ;; Emacs takes a function that fails off the hook, and the suggestion would stay on the screen for good.
  (condition-case err
      (midfill--follow)
    (error
     (message "midfill: %s" (error-message-string err))
     (setq midfill--seen nil)
     (midfill--clear))))

(defun midfill--follow ()
  "Draw the rest of the suggestion at point, or request another one."
  (let* ((tick (buffer-chars-modified-tick))
         (is-edited (not (eql tick midfill--tick)))
         (rest (midfill--rest midfill--shown)))
    (setq midfill--tick tick)
    (cond
     ((not (midfill--can-show))
      (setq midfill--seen nil)
      (midfill--clear))
     ((midfill--is-here midfill--seen))
     (t
      (setq midfill--seen (midfill--here))
      (if rest
          (midfill--draw rest)
        (midfill--clear)
        (when (and is-edited midfill-auto (not (memq this-command midfill-silent-commands)))
          (midfill--ask-soon)))))))

(defun midfill--before-redisplay (&rest _)
  "Hide the suggestion if it may not be shown any more.
Not every change comes from a command."
  (when (and (overlayp midfill--overlay) (overlay-buffer midfill--overlay))
    (with-current-buffer (overlay-buffer midfill--overlay)
      (unless (and (eq (overlay-get midfill--overlay 'window) (selected-window))
                   (ignore-errors (midfill--can-show)))
        (setq midfill--seen nil)
        (midfill--clear)))))

(defun midfill--became-ready ()
  "Request a suggestion for text typed before the server was ready."
  (with-current-buffer (window-buffer)
    (when (and midfill-auto (midfill--is-here midfill--seen) (midfill--can-show))
      (midfill--ask 2))))

;;; Commands

(defun midfill-accept (&optional part)
  "Insert the suggestion, or PART of it: `word' or `line'."
  (interactive)
  (let* ((suggestion midfill--shown)
         (rest (or (midfill--rest suggestion) (user-error "There is no suggestion at point")))
         (piece (midfill--piece (car rest) part))
         (is-all (equal piece (car rest))))
    ;; One undo takes back what was accepted, and not what had been typed before.
    (undo-boundary)
    (delete-region (point) (+ (point) (seq-count (lambda (at) (< at (length piece))) (cdr rest))))
    (insert piece)
    (when is-all
      (midfill--clear)
      (midfill--run (midfill--suggestion-command suggestion)
                    (midfill--suggestion-connection suggestion)))))

(defun midfill--run (command connection)
  "Ask the server at CONNECTION to run an item's COMMAND, if it has one."
  (when command
    (midfill-server-request connection :workspace/executeCommand
                            (list :command (midfill-server-get command :command)
                                  :arguments (midfill-server-get command :arguments))
                            #'ignore)))

(defun midfill-accept-word ()
  "Insert the next word of the suggestion."
  (interactive)
  (midfill-accept 'word))

(defun midfill-accept-line ()
  "Insert the rest of the suggestion's line."
  (interactive)
  (midfill-accept 'line))

(defun midfill-dismiss ()
  "Dismiss the suggestion; the next change requests another one."
  (interactive)
  (midfill--clear))

(defun midfill-suggest ()
  "Request a suggestion, even where none is shown automatically."
  (interactive)
  (cond
   ((not (bound-and-true-p midfill-mode)) (user-error "`midfill-mode' is off in this buffer; switch it on with M-x midfill-mode"))
   ((not midfill--enabled) (user-error "Suggestions are off; switch them on with M-x midfill-toggle"))
   ((not (midfill-server-connection)) (user-error "The server is not ready (%s); see M-x midfill-status" midfill-server-state))
   (t (midfill--ask 1)
      (setq midfill--seen (midfill--here)))))

(defun midfill-toggle ()
  "Switch all suggestions off or on, ghost text and popup items."
  (interactive)
  (setq midfill--enabled (not midfill--enabled))
  (midfill--clear)
  (midfill--tell-enabled)
  (message "midfill: suggestions are %s" (if midfill--enabled "on" "off"))
  (force-mode-line-update t))

(defun midfill--tell-enabled ()
  "Send to the server if suggestions are switched on."
  (when-let ((connection (midfill-server-connection)))
    (midfill-server-notify connection :workspace/didChangeConfiguration
                           (list :settings
                                 (list :midfill (list :enabled (if midfill--enabled t :json-false)))))))

(defun midfill--explain (done)
  "Call DONE with lines that explain the last answer for this buffer."
  (if-let ((connection (midfill-server-connection)))
      (midfill-server-request
       connection :midfill/explain
       (list :textDocument (midfill-server-get (midfill-server-position-params) :textDocument))
       (lambda (result) (funcall done (midfill--explanation result))))
    (funcall done (list (format "midfill is not active in this buffer (server: %s)."
                                midfill-server-state)))))

(defun midfill--text (object key)
  "Return the member KEY of the JSON OBJECT if it is a string, else nil.
A newer server may send other types."
  (let ((value (midfill-server-get object key)))
    (and (stringp value) value)))

(defun midfill--number (object key)
  "Return the member KEY of the JSON OBJECT if it is a number, else 0."
  (let ((value (midfill-server-get object key)))
    (if (numberp value) value 0)))

(defun midfill--rows (object key format name number)
  "Return lines for the list that is the member KEY of the JSON OBJECT.
FORMAT is applied to the members NAME and NUMBER of each of its items."
  (let ((rows (midfill-server-get object key)))
    (and (sequencep rows)
         (mapcar (lambda (row)
                   (format format (or (midfill--text row name) "?") (midfill--number row number)))
                 rows))))

(defun midfill--explanation (result)
  "Return RESULT, an answer to `midfill/explain', as lines for people."
  (let ((source (or (midfill--text result :source) "none")))
    (append
     (list (cond ((null result) "The server sent no explanation.")
                 ((midfill--text result :message))
                 ((midfill--text result :reason)
                  (format "No suggestion: %s." (midfill--text result :reason)))
                 ((equal source "none") "No suggestion has been requested in this buffer yet.")
                 (t (format "The last suggestion came from: %s." source))))
     (when (numberp (midfill-server-get result :latencyMs))
       (cons (format "total: %.0f ms" (midfill-server-get result :latencyMs))
             (midfill--rows result :stages "  %-16s%8.1f ms" :stage :ms)))
     (when (> (midfill--number result :promptTokens) 0)
       (cons (format "prompt: %d tokens, %d of them cached; %d tokens generated"
                     (midfill--number result :promptTokens) (midfill--number result :reusedTokens)
                     (midfill--number result :generatedTokens))
             (midfill--rows result :segments "  %-16s%8d tokens" :source :tokens)))
     (midfill--rows result :filters "filter: %s (%+d characters)" :filter :characters))))

(defun midfill-explain ()
  "Explain the last answer for this buffer."
  (interactive)
  (midfill--explain (lambda (lines) (message "%s" (string-join lines "\n")))))

(defun midfill-status ()
  "Show the state of the server and its last answer."
  (interactive)
  (let ((lines (list (format "client: %s" midfill-client)
                     (format "suggestions: %s" (if midfill--enabled "on" "off (M-x midfill-toggle)"))
                     (format "this buffer: %s" (if (midfill-server-connection) "active" "not active")))))
    (when (eq midfill-client 'own)
      (setq lines (append (list (format "server: %s%s" midfill-server-state
                                        (if midfill-server-version
                                            (format ", midfill %s" midfill-server-version)
                                          ""))
                                (format "model: %s" (or midfill-server-model "unknown until the server is ready")))
                          lines)))
    (midfill--explain
     (lambda (explained)
       (message "%s\nlast answer: %s" (string-join lines "\n") (car explained))))))

(defun midfill-restart ()
  "Restart the server."
  (interactive)
  (midfill--clear)
  (midfill-server-restart))

(defun midfill-log ()
  "Show the log of the separate server."
  (interactive)
  (let ((buffer (or (get-buffer " *midfill stderr*") (get-buffer "*midfill stderr*"))))
    (unless buffer
      (user-error "The server has written no log; with Eglot or lsp-mode, see their buffers"))
    (pop-to-buffer buffer)
    (goto-char (point-max))))

;;; Popup items

(defun midfill-completion-at-point ()
  "Offer the suggestion to `completion-at-point' by its first line.
Accepting it inserts all lines."
  (when-let* ((connection (and (eq midfill-client 'own) midfill--enabled (midfill-server-connection)))
              (item (midfill--popup-item connection))
              (text (midfill-server-get item :textEdit :newText))
              (range (midfill-server-get item :textEdit :range))
              (start (midfill--popup-start range)))
    (let ((label (car (split-string text "\n")))
          ;; What the editor has closed by itself may be replaced.
          (replaced (max 0 (- (midfill-server-get range :end :character)
                              (plist-get (midfill-server--position (point)) :character)))))
      (when (and (not (string-empty-p label))
                 (string-prefix-p (buffer-substring-no-properties start (point)) label))
        (list start (point) (list label)
              :exclusive 'no
              :annotation-function (lambda (_) " midfill")
              :company-kind (lambda (_) 'text)
              :company-doc-buffer
              (lambda (_)
                (with-current-buffer (get-buffer-create " *midfill doc*")
                  (erase-buffer)
                  (insert text)
                  (current-buffer)))
              :exit-function
              (lambda (_ status)
                (when (eq status 'finished)
                  (delete-region (point) (+ (point) replaced))
                  (insert (substring text (length label)))
                  (midfill--run (midfill-server-get item :command) connection))))))))

(defun midfill--popup-start (range)
  "Return the position at which the RANGE of an item begins."
  (let ((column (midfill-server-get range :start :character))
        (start (point)))
    (while (and (> start (line-beginning-position))
                (> (plist-get (midfill-server--position start) :character) column))
      (cl-decf start))
    start))

(defun midfill--popup-item (connection)
  "Request the completion item for point from CONNECTION."
  (midfill-server-flush connection)
  (midfill-server-get
   (ignore-errors
     (jsonrpc-request connection :textDocument/completion (midfill-server-position-params)
                      :timeout 2 :cancel-on-input t))
   :items 0))

;;; The mode

(defun midfill--lighter ()
  "Return the mode line text of the mode."
  (cond
   ((not midfill--enabled) " midfill:off")
   ((not (eq midfill-client 'own)) (if (midfill-server-connection) " midfill" ""))
   ((and (eq midfill-server-state 'loading) midfill-server-percentage)
    (format " midfill:%d%%%%" midfill-server-percentage))
   ((eq midfill-server-state 'ready) " midfill")
   (t (format " midfill:%s" midfill-server-state))))

;;;###autoload
(define-minor-mode midfill-mode
  "Show suggestions of the language server midfill as ghost text.
\\<midfill-suggestion-map>
\\[midfill-accept] accepts a suggestion, \\[midfill-accept-word] its next word, \\[midfill-accept-line] the
rest of its line, \\[midfill-dismiss] dismisses it; these keys are bound only
while one is shown.  \\<midfill-mode-map>\\[midfill-suggest] requests one."
  :lighter (:eval (midfill--lighter))
  :group 'midfill
  (cond
   (midfill-mode
    (add-to-list 'emulation-mode-map-alists 'midfill--keys)
    (add-hook 'post-command-hook #'midfill--after-command)
    (add-hook 'pre-redisplay-functions #'midfill--before-redisplay)
    (add-hook 'midfill-server-ready-hook #'midfill--became-ready)
    (add-hook 'midfill-server-gone-hook #'midfill--clear)
    (when midfill-popup
      (add-hook 'completion-at-point-functions #'midfill-completion-at-point 90 t))
    (setq midfill--tick (buffer-chars-modified-tick))
    (midfill-server-attach))
   (t
    (midfill--clear)
    (remove-hook 'completion-at-point-functions #'midfill-completion-at-point t)
    (midfill-server-detach)
    (unless (cl-some (lambda (buffer) (buffer-local-value 'midfill-mode buffer)) (buffer-list))
      (remove-hook 'post-command-hook #'midfill--after-command)
      (remove-hook 'pre-redisplay-functions #'midfill--before-redisplay)))))

(defun midfill--turn-on ()
  "Switch `midfill-mode' on in buffers that can be edited."
  (unless (or buffer-read-only
              (minibufferp)
              ;; Buffers that nobody sees.
              (string-prefix-p " " (buffer-name)))
    (midfill-mode)))

;;;###autoload
(define-globalized-minor-mode global-midfill-mode midfill-mode midfill--turn-on
  :predicate '(prog-mode conf-mode)
  :group 'midfill)

(provide 'midfill)
;;; midfill.el ends here

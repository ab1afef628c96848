// A witness and a witness's client that are not ours: transparency-dev's, behind a few lines.
//
//	witness serve LOG_VKEY WITNESS_SKEY      serves add-checkpoint; prints its port
//	witness submit URL WITNESS_VKEY OLD      sends the request body that comes on stdin
package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	cosign "github.com/transparency-dev/formats/note"
	"github.com/transparency-dev/witness/api"
	client "github.com/transparency-dev/witness/client/http"
	"github.com/transparency-dev/witness/persistence/inmemory"
	"github.com/transparency-dev/witness/witness"
	"golang.org/x/mod/sumdb/note"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(arguments []string) error {
	switch {
	case len(arguments) == 3 && arguments[0] == "serve":
		return serve(arguments[1], arguments[2])
	case len(arguments) == 4 && arguments[0] == "submit":
		return submit(arguments[1], arguments[2], arguments[3])
	}
	return errors.New("serve LOG_VKEY WITNESS_SKEY | submit URL WITNESS_VKEY OLD")
}

func serve(logKey, witnessKey string) error {
	signer, err := cosign.NewSignerForCosignatureV1(witnessKey)
	if err != nil {
		return err
	}
	verifier, err := note.NewVerifier(logKey)
	if err != nil {
		return err
	}
	known := func(_ context.Context, origin string) (note.Verifier, bool, error) {
		return verifier, origin == verifier.Name(), nil
	}
	desk, err := witness.New(context.Background(), witness.Opts{
		Persistence:    inmemory.New(),
		Signers:        []note.Signer{signer},
		VerifierForLog: known,
	})
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+api.HTTPAddCheckpoint, witness.NewHTTPHandler(desk).AddCheckpoint)
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	return server.Serve(listener)
}

func submit(address, witnessKey, old string) error {
	where, err := url.Parse(address)
	if err != nil {
		return err
	}
	verifier, err := cosign.NewVerifierForCosignatureV1(witnessKey)
	if err != nil {
		return err
	}
	size, err := strconv.ParseUint(old, 10, 64)
	if err != nil {
		return err
	}
	body, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	head, checkpoint, _ := bytes.Cut(body, []byte("\n\n"))
	var proof [][]byte
	for _, line := range strings.Split(string(head), "\n")[1:] {
		hash, err := base64.StdEncoding.DecodeString(line)
		if err != nil {
			return err
		}
		proof = append(proof, hash)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	lines, held, err := client.NewWitness(where, http.DefaultClient).Update(ctx, size, checkpoint, proof)
	if err != nil {
		return fmt.Errorf("%w (%d)", err, held)
	}
	opened, err := note.Open(append(checkpoint, lines...), note.VerifierList(verifier))
	if err != nil {
		return err
	}
	fmt.Print("cosigned by ", opened.Sigs[0].Name, "\n")
	return nil
}
